"""What each rank of a run of Automodel's recipe runs."""

from frameworks.automodel_models import gates_of
from frameworks.automodel_on_cpu import trained

NOTES = ("gradients", "loads", "biases", "metrics", "steps", "initial")


def train_rank(rank, folder, cases, strategies, resumed):
    """By case and strategy, what comes out on this rank; by case, what kinds of weights and biases its gates have.

    ``resumed``: by name, the arguments of a run that is trained at once and in two parts. By name, what came of both.
    """
    results, kinds = {}, {}
    for case, arguments in cases.items():
        for strategy in strategies:
            recipe = trained(folder, *arguments, f"--balance={strategy}")
            results[case, strategy] = {name: getattr(recipe, name) for name in NOTES}
        (model,) = recipe.model_parts
        gates = gates_of(model).values()
        kinds[case] = {(type(gate.weight).__name__, type(gate.e_score_correction_bias).__name__) for gate in gates}
    outcomes = {}
    for name, arguments in resumed.items():
        whole = trained(f"{folder}/{name}/whole", *arguments, "--step_scheduler.max_steps=4")
        trained(f"{folder}/{name}/parts", *arguments, "--step_scheduler.max_steps=2")
        rest = trained(f"{folder}/{name}/parts", *arguments, "--step_scheduler.max_steps=4")
        assert len(rest.steps) == 2
        outcomes[name] = [(run.loads[-2:], run.biases[-2:], run.balance.state_dict()) for run in (whole, rest)]
    return results, kinds, outcomes
