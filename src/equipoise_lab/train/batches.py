"""Micro-batches of token ids, as a pure function of the text, the seed and the step."""

from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Int64

from equipoise.errors import UsageError
from equipoise_lab.train.data import Corpus

__all__ = ["Batches", "TokenBatch"]

DRAWS = {"domains": 0, "sequences": 1, "shuffle": 2}  # purpose of a random stream: its key after the seed


class TokenBatch(NamedTuple):
    """The token ids of one forward."""

    domain: str  # "mixed" if the sequences come from several domains
    input_ids: Int64[torch.Tensor, "sequences length"]


@final
class Batches:
    """Micro-batches as a pure function of (seed, step). No state has to be saved, and any step can be computed.

    The micro-batches of all ranks and steps have global numbers g = (step * micro_batches_per_step + m) * num_ranks +
    rank. With D domains they come in rounds of D. Round r = g // D visits the domains in a newly drawn order. It takes
    the next ``sequences_per_micro_batch`` sequences from each domain's endless stream. Every epoch of a stream is
    another permutation of the domain's sequences. So all domains occur equally often, however long their text is.

    With ``shuffled=True`` a step has the same sequences, permuted over all its micro-batches and ranks. Every
    micro-batch then mixes domains and is called ``mixed``.

    ``balance_batch`` consecutive micro-batches are joined into one, which is forwarded as a whole. The joined batches
    are distributed over the ranks. The sequences of a step and their order stay the same. A joined batch of several
    domains is called ``mixed``.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        sequence_length: int,
        sequences_per_micro_batch: int,
        micro_batches_per_step: int,
        seed: int,
        shuffled: bool = False,
        balance_batch: int = 1,
        rank: int = 0,
        num_ranks: int = 1,
        split: str = "train",
    ):
        for name, value, minimum in (
            ("sequence_length", sequence_length, 1),
            ("sequences_per_micro_batch", sequences_per_micro_batch, 1),
            ("micro_batches_per_step", micro_batches_per_step, 1),
            ("balance_batch", balance_batch, 1),
            ("num_ranks", num_ranks, 1),
            ("seed", seed, 0),
        ):
            if value < minimum:
                raise ValueError(f"{name} must be at least {minimum}: got {value}.")
        if micro_batches_per_step % balance_batch:
            raise ValueError(
                f"balance_batch must divide micro_batches_per_step: got {balance_batch} and {micro_batches_per_step}."
            )
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank must be from 0 to num_ranks - 1: got rank {rank} of {num_ranks} ranks.")
        self._rows = [corpus.sequences(split, domain, sequence_length) for domain in corpus.domains]
        for domain, rows in zip(corpus.domains, self._rows, strict=True):
            if len(rows) < sequences_per_micro_batch:
                raise UsageError(
                    f"A domain must fill a micro-batch of {sequences_per_micro_batch} sequences: the {split} text of "
                    f"{domain!r} has {len(rows)} sequences of {sequence_length} tokens. Add text, or use fewer or "
                    "shorter sequences."
                )
        self.domains = corpus.domains
        self.seed, self.shuffled, self.rank, self.num_ranks = seed, shuffled, rank, num_ranks
        self.sequences_per_micro_batch, self.micro_batches_per_step = sequences_per_micro_batch, micro_batches_per_step
        self.balance_batch = balance_batch
        self._epochs: dict[int, tuple[int, np.ndarray]] = {}  # by domain: the epoch used last and its order

    def window(self, step: int) -> list[TokenBatch]:
        """The batches that this rank forwards in ``step`` (counted from 0), in order."""
        if step < 0:
            raise ValueError(f"step must be at least 0: got {step}.")
        num = self.micro_batches_per_step * self.num_ranks
        batches = np.stack([self._addresses(step * num + place) for place in range(num)])  # (num, sequences, 2)
        if self.shuffled:
            pool = batches.reshape(-1, 2)
            batches = pool[self._permutation(len(pool), "shuffle", step)].reshape(batches.shape)
        joined = batches.reshape(num // self.balance_batch, -1, 2)
        return [TokenBatch(self._name(batch), self._gather(batch)) for batch in joined[self.rank :: self.num_ranks]]

    def _name(self, addresses: Int64[np.ndarray, "sequences 2"]) -> str:
        pure = not self.shuffled and (addresses[:, 0] == addresses[0, 0]).all()
        return self.domains[addresses[0, 0]] if pure else "mixed"

    def _addresses(self, number: int) -> Int64[np.ndarray, "sequences 2"]:
        """(domain, row) of each sequence of the micro-batch with this global number."""
        round_number, place = divmod(number, len(self.domains))
        domain = int(self._permutation(len(self.domains), "domains", round_number)[place])
        first = round_number * self.sequences_per_micro_batch
        rows = [self._row(domain, first + i) for i in range(self.sequences_per_micro_batch)]
        return np.array([(domain, row) for row in rows], np.int64)

    def _row(self, domain: int, index: int) -> int:
        num = len(self._rows[domain])
        epoch, place = divmod(index, num)
        if self._epochs.get(domain, (-1,))[0] != epoch:
            self._epochs[domain] = epoch, self._permutation(num, "sequences", domain, epoch)
        return int(self._epochs[domain][1][place])

    def _permutation(self, num: int, draw: str, *numbers: int) -> Int64[np.ndarray, " num"]:
        # numpy guarantees that raw bits stay the same in later versions, but not Generator.permutation.
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, DRAWS[draw], *numbers])).random_raw(num)
        return np.argsort(bits, kind="stable")

    def _gather(self, addresses: Int64[np.ndarray, "sequences 2"]) -> Int64[torch.Tensor, "sequences length"]:
        return torch.from_numpy(np.stack([self._rows[domain][row] for domain, row in addresses]).astype(np.int64))
