"""Independent reference for the tests: plain loops over lists of Python floats (float64), `math` only.

Written from the definitions in the design (section 5) and the papers, without reading the library, so that
a mistake would have to be made twice to stay hidden. Slow on purpose: one loop per sum sign of the formula.

Notation, per layer: t a token, e an expert, T tokens, E experts, k experts a token, z logits, s scores,
c_e the number of assignments to expert e, f_e = c_e / sum(c) its share, N the number of unmasked tokens,
P_e the mean over the unmasked tokens of s_te / sum_e s_te (or of the raw s_te when normalise is False).

Inputs are nested lists: logits and scores [T][E], expert_ids [T][k], mask [T] (true for a token that counts;
None: all count), sequence_ids [T], counts [E]. Nothing is changed in place.

What the definitions leave open is decided here so: a loss or gradient over no token is 0; a metric of a layer
without any assignment has no value and is nan (except dead_experts, which is then E).

Run `python tests/reference.py` for the self-check against numbers worked out by hand.
"""

import math

# ---------------------------------------------------------------------------------------------------------
# trivial helpers


def softmax(row):
    """softmax(z)_e = exp(z_e) / sum_j exp(z_j), shifted by the maximum so that it cannot overflow."""
    top = max(row)
    powers = [math.exp(z - top) for z in row]
    total = sum(powers)
    return [power / total for power in powers]


def sigmoid(z):
    """sigmoid(z) = 1 / (1 + exp(-z)), written so that exp never overflows."""
    if z >= 0:
        return 1.0 / (1.0 + math.exp(-z))
    return math.exp(z) / (1.0 + math.exp(z))


def softplus(z):
    """softplus(z) = ln(1 + exp(z)) = max(z, 0) + ln(1 + exp(-|z|))."""
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))


def is_counted(mask, t):
    """Whether token t counts: no mask, or a true (non-zero) entry."""
    return mask is None or bool(mask[t])


# ---------------------------------------------------------------------------------------------------------
# scores, routing, load


def scores(logits, gate):
    """Scores of every token, one gate applied to each row of logits.

    softmax: s = exp(z_e) / sum exp(z) (paper 2, eq. 2); sigmoid: s = 1 / (1 + exp(-z)) (paper 1, eq. 1);
    sqrt_softplus: s = sqrt(ln(1 + exp(z))) (DeepSeek-V4 report).
    """
    rows = []
    for row in logits:
        if gate == "softmax":
            rows.append(softmax(row))
        elif gate == "sigmoid":
            rows.append([sigmoid(z) for z in row])
        elif gate == "sqrt_softplus":
            rows.append([math.sqrt(softplus(z)) for z in row])
        else:
            raise ValueError(f"unknown gate {gate!r}")
    return rows


def route(logits, k, gate, offset=None, num_groups=1, top_groups=1, renormalise=False, scale=1.0):
    """The k experts of every token and their weights: (expert_ids [T][k], weights [T][k]).

    Choice (paper 1, eq. 3): the k largest of s_te + b_e, listed by descending choice score, ties to the lower
    index. Group limit (DeepSeek-V3, released code): the experts form num_groups equal consecutive groups; a
    group's value is the sum of its two highest choice scores; experts outside the best top_groups groups have
    the choice score -inf. Weights: the plain scores s_te of the chosen (never s + b), divided by their sum
    over the chosen if renormalise, then times scale.
    """
    all_ids, all_weights = [], []
    for row in scores(logits, gate):
        num_experts = len(row)
        choice = [row[e] + (0.0 if offset is None else offset[e]) for e in range(num_experts)]

        if num_groups > 1:
            if num_experts % num_groups != 0:
                raise ValueError(f"{num_experts} experts do not form {num_groups} equal groups")
            size = num_experts // num_groups
            values = []
            for g in range(num_groups):
                members = sorted(choice[g * size : (g + 1) * size], reverse=True)
                values.append(sum(members[:2]))
            best = sorted(range(num_groups), key=lambda g: (-values[g], g))[:top_groups]
            for e in range(num_experts):
                if e // size not in best:
                    choice[e] = -math.inf

        order = sorted(range(num_experts), key=lambda e: (-choice[e], e))
        chosen = order[:k]
        if len(chosen) < k or any(choice[e] == -math.inf for e in chosen):
            raise ValueError(f"fewer than {k} experts may be chosen")

        weights = [row[e] for e in chosen]
        if renormalise:
            total = sum(weights)
            weights = [weight / total for weight in weights]
        all_ids.append(chosen)
        all_weights.append([weight * scale for weight in weights])
    return all_ids, all_weights


def load(expert_ids, num_experts, mask=None):
    """c_e = number of (token, slot) assignments to expert e over the unmasked tokens (design, section 5)."""
    counts = [0] * num_experts
    for t in range(len(expert_ids)):
        if is_counted(mask, t):
            for e in expert_ids[t]:
                counts[e] += 1
    return counts


def sequence_loads(expert_ids, sequence_ids, num_experts, mask=None):
    """The load of every sequence by itself: {sequence id: [c_e]}. A wholly masked sequence has zeros."""
    loads = {}
    for t in range(len(expert_ids)):
        if sequence_ids[t] not in loads:
            loads[sequence_ids[t]] = [0] * num_experts
        if is_counted(mask, t):
            for e in expert_ids[t]:
                loads[sequence_ids[t]][e] += 1
    return loads


# ---------------------------------------------------------------------------------------------------------
# losses


def load_balancing_loss(scores, counts, k, mask=None, normalise=True):
    """L = E * sum_e f_e P_e, 1 at perfect balance (design, section 5; paper 2, eq. 2).

    f_e = c_e / sum(c); counts may come from a wider scope than the scores (paper 2, eq. 6). For counts of N'
    tokens sum(c) = k N', so k, which is in the signature for the sake of the reader, does not enter again.
    P_e = (1/N) sum_t s_te / sum_j s_tj, or (1/N) sum_t s_te if not normalise. 0 without tokens.
    """
    num_experts = len(counts)
    assignments = sum(counts)
    tokens = 0
    sums = [0.0] * num_experts
    for t in range(len(scores)):
        if is_counted(mask, t):
            tokens += 1
            divisor = sum(scores[t]) if normalise else 1.0
            for e in range(num_experts):
                sums[e] += scores[t][e] / divisor
    if tokens == 0 or assignments == 0:
        return 0.0
    loss = 0.0
    for e in range(num_experts):
        share = counts[e] / assignments
        mean_score = sums[e] / tokens
        loss += share * mean_score
    return num_experts * loss


def sequence_loss(scores, expert_ids, sequence_ids, mask=None, normalise=True):
    """L = sum_s (N_s / N) * E * sum_e f^s_e P^s_e: the token-weighted mean of each sequence's own loss.

    (Paper 1, eq. 2 and DeepSeek-V3's sequence-wise loss, with shares that sum to 1.) f^s and P^s are taken
    over the N_s unmasked tokens of sequence s; N = sum_s N_s. 0 without tokens.
    """
    total_tokens = sum(1 for t in range(len(scores)) if is_counted(mask, t))
    loss = 0.0
    for sequence in sorted(set(sequence_ids)):
        members = [t for t in range(len(scores)) if sequence_ids[t] == sequence and is_counted(mask, t)]
        if not members:
            continue
        num_experts = len(scores[0])
        assignments = sum(len(expert_ids[t]) for t in members)
        own = 0.0
        for e in range(num_experts):
            used = sum(1 for t in members for chosen in expert_ids[t] if chosen == e)
            share = used / assignments
            mean_score = 0.0
            for t in members:
                score = scores[t][e]
                if normalise:
                    score = score / sum(scores[t])
                mean_score += score / len(members)
            own += share * mean_score
        loss += len(members) / total_tokens * num_experts * own
    return loss


# ---------------------------------------------------------------------------------------------------------
# gradients with respect to the logits; f is held fixed (a count carries no gradient)


def load_balancing_gradient(logits, counts, gate, mask=None, normalise=True):
    """dL/dz_tj of L = E * sum_e f_e P_e with f = counts / sum(counts) fixed; rows of zeros for masked tokens.

    Chain rule in two steps for each unmasked token, with S = sum_i s_i and p_e = s_e / S:
      dL/ds_i = (E/N) * sum_e f_e dp_e/ds_i,   dp_e/ds_i = [e = i]/S - s_e/S^2      (normalise)
              = (E/N) * f_i                                                       (raw scores)
      dL/dz_j = sum_i dL/ds_i * ds_i/dz_j
        softmax:        ds_i/dz_j = s_i ([i = j] - s_j)
        sigmoid:        ds_j/dz_j = s_j (1 - s_j)
        sqrt_softplus:  ds_j/dz_j = sigmoid(z_j) / (2 s_j)
    """
    num_experts = len(counts)
    assignments = sum(counts)
    tokens = sum(1 for t in range(len(logits)) if is_counted(mask, t))
    gradient = [[0.0] * num_experts for _ in logits]
    if tokens == 0 or assignments == 0:
        return gradient
    share = [count / assignments for count in counts]

    for t, s in enumerate(scores(logits, gate)):
        if not is_counted(mask, t):
            continue

        by_score = [0.0] * num_experts
        total = sum(s)
        for i in range(num_experts):
            if normalise:
                for e in range(num_experts):
                    same = 1.0 if e == i else 0.0
                    by_score[i] += share[e] * (same / total - s[e] / total**2)
            else:
                by_score[i] = share[i]
            by_score[i] *= num_experts / tokens

        for j in range(num_experts):
            if gate == "softmax":
                for i in range(num_experts):
                    same = 1.0 if i == j else 0.0
                    gradient[t][j] += by_score[i] * s[i] * (same - s[j])
            elif gate == "sigmoid":
                gradient[t][j] = by_score[j] * s[j] * (1.0 - s[j])
            elif s[j] > 0.0:  # sqrt_softplus; the slope tends to 0 where the score underflows to 0
                gradient[t][j] = by_score[j] * sigmoid(logits[t][j]) / (2.0 * s[j])
    return gradient


def sequence_gradient(logits, expert_ids, sequence_ids, gate, mask=None, normalise=True):
    """dL/dz_tj of the sequence loss, every sequence's f^s fixed; rows of zeros for masked tokens.

    (N_s/N) * (1/N_s) = 1/N, so token t of sequence s has dL/dz_tj = (E/N) sum_e f^s_e dp_te/dz_tj. Here the
    derivative of p is written in one step (unlike in load_balancing_gradient), with d_j = ds_j/dz_j:
      softmax (normalised or not, S is 1):          dp_e/dz_j = p_e ([e = j] - p_j)
      sigmoid, sqrt_softplus, normalise:            dp_e/dz_j = ([e = j] - p_e) d_j / S
      sigmoid, sqrt_softplus, raw:                  dp_e/dz_j = [e = j] d_j
      d_j = exp(-z)/(1 + exp(-z))^2 for sigmoid,    sigmoid(z) / (2 sqrt(softplus(z))) for sqrt_softplus
    """
    gradient = [[0.0] * len(row) for row in logits]
    total_tokens = sum(1 for t in range(len(logits)) if is_counted(mask, t))

    for t, row in enumerate(logits):
        if not is_counted(mask, t):
            continue
        num_experts = len(row)

        used = [0] * num_experts
        for other in range(len(logits)):
            if sequence_ids[other] == sequence_ids[t] and is_counted(mask, other):
                for e in expert_ids[other]:
                    used[e] += 1
        share = [count / sum(used) for count in used]

        if gate == "softmax":
            s = softmax(row)
        elif gate == "sigmoid":
            s = [sigmoid(z) for z in row]
            slope = [math.exp(-abs(z)) / (1.0 + math.exp(-abs(z))) ** 2 for z in row]  # even in z
        elif gate == "sqrt_softplus":
            s = [math.sqrt(softplus(z)) for z in row]
            slope = [sigmoid(z) / (2.0 * math.sqrt(softplus(z))) if softplus(z) > 0.0 else 0.0 for z in row]
        else:
            raise ValueError(f"unknown gate {gate!r}")
        total = sum(s)

        for j in range(num_experts):
            for e in range(num_experts):
                same = 1.0 if e == j else 0.0
                if gate == "softmax":
                    derivative = s[e] * (same - s[j])
                elif normalise:
                    derivative = (same - s[e] / total) * slope[j] / total
                else:
                    derivative = same * slope[j]
                gradient[t][j] += num_experts / total_tokens * share[e] * derivative
    return gradient


def numerical_gradient(function, logits, eps=1e-6):
    """dF/dz_tj by central differences, (F(z + eps) - F(z - eps)) / (2 eps); function: logits -> number."""
    gradient = []
    for t in range(len(logits)):
        gradient.append([])
        for j in range(len(logits[t])):
            above = [list(row) for row in logits]
            below = [list(row) for row in logits]
            above[t][j] += eps
            below[t][j] -= eps
            gradient[t].append((function(above) - function(below)) / (2.0 * eps))
    return gradient


def global_batch_gradients(micro_batches, k, gate, coefficient, weights, normalise=True):
    """Exact gradients of the global-batch loss, in two passes: one list of rows for each micro-batch.

    Micro-batch m is a dict with "logits", "expert_ids" and (optional) "mask". First pass: c_e pooled over all
    micro-batches, f̄ = c / sum(c). Second pass: the gradient of weights[m] * coefficient * E sum_e f̄_e P^m_e
    with respect to the logits of m, P^m the mean over the unmasked tokens of m (paper 2, eqs. 4-6). k is the
    number of experts a token and is checked only.
    """
    num_experts = None
    pooled = None
    for micro_batch in micro_batches:
        for t, row in enumerate(micro_batch["logits"]):
            if pooled is None:
                num_experts = len(row)
                pooled = [0] * num_experts
            if is_counted(micro_batch.get("mask"), t):
                if len(micro_batch["expert_ids"][t]) != k:
                    raise ValueError(f"a token with {len(micro_batch['expert_ids'][t])} experts, not {k}")
                for e in micro_batch["expert_ids"][t]:
                    pooled[e] += 1

    gradients = []
    for m, micro_batch in enumerate(micro_batches):
        if not micro_batch["logits"]:
            gradients.append([])
            continue
        rows = load_balancing_gradient(micro_batch["logits"], pooled, gate, micro_batch.get("mask"), normalise)
        gradients.append([[weights[m] * coefficient * value for value in row] for row in rows])
    return gradients


# ---------------------------------------------------------------------------------------------------------
# offsets


def sign_rule(offset, counts, rate, center):
    """b_e + rate * (sign(c̄ - c_e) [- mean of the signs if center]); the new offset as a list.

    (Paper 1, algorithm 1; centred: Moonlight, appendix C.) sign(c̄ - c_e) = sign(sum(c) - E c_e), in integers.
    Without any load every sign is 0 and the offset stays.
    """
    num_experts = len(counts)
    total = sum(counts)
    signs = []
    for count in counts:
        difference = total - num_experts * count
        if difference > 0:
            signs.append(1)
        elif difference < 0:
            signs.append(-1)
        else:
            signs.append(0)
    mean_sign = sum(signs) / num_experts if center else 0.0
    return [offset[e] + rate * (signs[e] - mean_sign) for e in range(num_experts)]


def proportional_rule(offset, counts, rate, center):
    """b_e + rate * (c̄ - c_e) / c̄; the new offset as a list (paper 1, table 3 and appendix C; design, section 5).

    The errors sum to zero by themselves, so center changes nothing. Without any load the offset stays.
    """
    num_experts = len(counts)
    mean = sum(counts) / num_experts
    if mean == 0:
        return list(offset)
    return [offset[e] + rate * (mean - counts[e]) / mean for e in range(num_experts)]


# ---------------------------------------------------------------------------------------------------------
# metrics of one layer's counts


def max_violation(counts):
    """MaxVio = (max_e c_e - c̄) / c̄, from 0 (balance) to E - 1 (paper 1, eq. 4)."""
    mean = sum(counts) / len(counts)
    if mean == 0:
        return math.nan
    return (max(counts) - mean) / mean


def min_violation(counts):
    """(min_e c_e - c̄) / c̄, from -1 (a dead expert) to 0 (balance)."""
    mean = sum(counts) / len(counts)
    if mean == 0:
        return math.nan
    return (min(counts) - mean) / mean


def coefficient_of_variation(counts):
    """CV = sqrt((1/E) sum_e (c_e - c̄)^2) / c̄, from 0 (balance) to sqrt(E - 1) (Shazeer et al. 2017)."""
    mean = sum(counts) / len(counts)
    if mean == 0:
        return math.nan
    variance = 0.0
    for count in counts:
        variance += (count - mean) ** 2 / len(counts)
    return math.sqrt(variance) / mean


def entropy(counts):
    """H = - sum_e f_e ln f_e in nats, 0 ln 0 = 0, from 0 (one expert) to ln E (balance)."""
    total = sum(counts)
    if total == 0:
        return math.nan
    result = 0.0
    for count in counts:
        if count > 0:
            result -= count / total * math.log(count / total)
    return result


def normalised_entropy(counts):
    """H / ln E, from 0 (one expert) to 1 (balance) (2509.19349); nan for E = 1."""
    if len(counts) == 1:
        return math.nan
    return entropy(counts) / math.log(len(counts))


def effective_experts(counts):
    """exp(H), from 1 to E (balance): the number of equally used experts with the same entropy."""
    return math.exp(entropy(counts))


def dead_experts(counts):
    """The number of experts with c_e = 0."""
    return sum(1 for count in counts if count == 0)


def expected_maximum(num_experts):
    """m(E) = integral of x d/dx Φ(x)^E = integral of x E φ(x) Φ(x)^(E-1): the mean maximum of E standard normals.

    Simpson's rule from -10 to 10 with 20,000 steps; Φ(x) = erfc(-x / sqrt 2) / 2.
    """
    low, high, steps = -10.0, 10.0, 20_000
    width = (high - low) / steps
    integral = 0.0
    for i in range(steps + 1):
        x = low + i * width
        density = math.exp(-x * x / 2.0) / math.sqrt(2.0 * math.pi)
        cumulative = 0.5 * math.erfc(-x / math.sqrt(2.0))
        value = x * num_experts * density * cumulative ** (num_experts - 1)
        if i == 0 or i == steps:
            simpson = 1.0
        elif i % 2 == 1:
            simpson = 4.0
        else:
            simpson = 2.0
        integral += simpson * value
    return integral * width / 3.0


def sampling_floor(num_tokens, k, num_experts):
    """m(E) * sqrt((1 - k/E) / (N k/E)): the MaxVio that chance alone gives (design, section 5). nan for N = 0."""
    if num_tokens == 0:
        return math.nan
    probability = k / num_experts
    return expected_maximum(num_experts) * math.sqrt((1.0 - probability) / (num_tokens * probability))


# ---------------------------------------------------------------------------------------------------------
# specialisation of one layer


def domain_information_plugin(counts_by_domain):
    """I(domain; expert) = H(mean_d p(.|d)) - mean_d H(p(.|d)) in bits, with no correction for finite counts.

    p(e|d) = c_de / n_d, n_d = sum_e c_de; domains weigh equally; a domain without assignments is left out
    (nan if none is left). From 0 to log2 of the smaller of the numbers of domains and of experts.
    """
    distributions = []
    for counts in counts_by_domain:
        if sum(counts) > 0:
            distributions.append([count / sum(counts) for count in counts])
    if not distributions:
        return math.nan
    num_domains = len(distributions)
    information = 0.0
    for e in range(len(distributions[0])):
        mixed = sum(distribution[e] for distribution in distributions) / num_domains
        if mixed > 0:
            information -= mixed * math.log2(mixed)
        for distribution in distributions:
            if distribution[e] > 0:
                information += distribution[e] * math.log2(distribution[e]) / num_domains
    return information


def domain_information(counts_by_domain):
    """I(domain; expert) in bits, Miller-Madow corrected, domains equally weighted (design, section 5).

    As domain_information_plugin, but to each entropy is added (number of non-zero bins - 1) / (2 n) nats: for
    H(p(.|d)) n = n_d; for the mixture n = 1 / sum_d (w_d^2 / n_d), w_d = 1/D, the number of independent draws
    that would have the same variance. Not clipped: it may be slightly below 0 or above the plug-in's maximum.
    """
    kept = [counts for counts in counts_by_domain if sum(counts) > 0]
    if not kept:
        return math.nan
    num_domains = len(kept)
    num_experts = len(kept[0])

    mixture = [0.0] * num_experts
    inverse_effective = 0.0
    conditional_nats = 0.0
    for counts in kept:
        n = sum(counts)
        inverse_effective += (1.0 / num_domains) ** 2 / n
        bins = 0
        nats = 0.0
        for e in range(num_experts):
            p = counts[e] / n
            mixture[e] += p / num_domains
            if counts[e] > 0:
                bins += 1
                nats -= p * math.log(p)
        nats += (bins - 1) / (2.0 * n)
        conditional_nats += nats / num_domains

    bins = 0
    mixture_nats = 0.0
    for p in mixture:
        if p > 0:
            bins += 1
            mixture_nats -= p * math.log(p)
    effective = 1.0 / inverse_effective
    mixture_nats += (bins - 1) / (2.0 * effective)
    return (mixture_nats - conditional_nats) / math.log(2.0)


# ---------------------------------------------------------------------------------------------------------
# self-check


def _flatten(value):
    if isinstance(value, (list, tuple)):
        return [number for part in value for number in _flatten(part)]
    return [value]


def _expect(name, got, wanted, tolerance=1e-12):
    """Fails unless got and wanted (numbers or nested lists of them) agree to the tolerance."""
    got, wanted = _flatten(got), _flatten(wanted)
    same = len(got) == len(wanted) and all(abs(a - b) <= tolerance for a, b in zip(got, wanted, strict=True))
    if not same:
        raise AssertionError(f"{name}: got {got}, wanted {wanted}")
    _expect.passed += 1


_expect.passed = 0


def _self_check():
    import random

    ln = math.log
    gates = ("softmax", "sigmoid", "sqrt_softplus")

    # exp of the logits 1 : 2 : 5, sum 8
    _expect("softmax", scores([[0.0, ln(2), ln(5)]], "softmax"), [[1 / 8, 2 / 8, 5 / 8]])
    # 1 / (1 + 1/3) = 3/4 ; the mirrored logit gives 1/4 ; far out: no overflow
    _expect("sigmoid", scores([[ln(3), -ln(3), 0.0, 800.0, -800.0]], "sigmoid"), [[0.75, 0.25, 0.5, 1.0, 0.0]])
    # ln(1 + exp(ln(e - 1))) = ln e = 1, root 1 ; ln(1 + (e^4 - 1)) = 4, root 2 ; large z: softplus(z) = z
    z1, z2 = ln(math.e - 1), ln(math.exp(4) - 1)
    _expect("sqrt_softplus", scores([[z1, z2, 900.0]], "sqrt_softplus"), [[1.0, 2.0, 30.0]])

    # scores .9 .1 | .6 .5 | .7 .2 in three groups of two
    row = [[ln(s / (1 - s)) for s in (0.9, 0.1, 0.6, 0.5, 0.7, 0.2)]]
    ids, weights = route(row, 2, "sigmoid")  # no groups: .9 and .7
    _expect("route ids", ids, [[0, 4]])
    _expect("route weights", weights, [[0.9, 0.7]])
    # group values 1.0, 1.1, 0.9: only group 1 is open, though expert 0 is the best of all;
    # weights .6/1.1 and .5/1.1, times 2.5
    ids, weights = route(row, 2, "sigmoid", None, 3, 1, True, 2.5)
    _expect("group ids", ids, [[2, 3]])
    _expect("group weights", weights, [[1.5 / 1.1, 1.25 / 1.1]])
    # two groups open (1 and 0): .9 then .6
    _expect("two groups", route(row, 2, "sigmoid", None, 3, 2)[0], [[0, 2]])
    # offset +.85 on expert 1: choice .9 .95, group 0 worth 1.85; listed by choice; weights stay the plain scores
    ids, weights = route(row, 2, "sigmoid", [0, 0.85, 0, 0, 0, 0], 3, 1)
    _expect("offset ids", ids, [[1, 0]])
    _expect("offset weights", weights, [[0.1, 0.9]])
    _expect("ties", route([[0.0, 1.0, 0.0, 1.0]], 3, "softmax")[0], [[1, 3, 0]])

    # token 1 is masked: experts 0 1 and 1 2 remain
    ids = [[0, 1], [0, 3], [1, 2]]
    _expect("load", load(ids, 4), [2, 2, 1, 1])
    _expect("masked load", load(ids, 4, [1, 0, 1]), [1, 2, 1, 0])
    by_sequence = sequence_loads(ids, [7, 7, 3], 4, [1, 0, 1])
    _expect("sequence loads", [by_sequence[7], by_sequence[3]], [[1, 1, 0, 0], [0, 1, 1, 0]])

    # normalised rows (.75 .25) and (.5 .5): P = (.625 .375), f = (1 0): 2 * .625. Raw: P_0 = (.9 + .5)/2 = .7
    s = [[0.9, 0.3], [0.5, 0.5]]
    _expect("loss", load_balancing_loss(s, [2, 0], 1), 1.25)
    _expect("raw loss", load_balancing_loss(s, [2, 0], 1, normalise=False), 1.4)
    _expect("masked loss", load_balancing_loss(s, [2, 0], 1, [1, 0]), 1.5)
    _expect("empty loss", load_balancing_loss(s, [2, 0], 1, [0, 0]), 0.0)
    _expect("balance", load_balancing_loss(s, [5, 5], 1), 1.0)
    # sequence 0: 1.25 on two tokens; sequence 1: f = (0 1), P_1 = .8: 1.6 on one; (2 * 1.25 + 1.6)/3
    s = s + [[0.2, 0.8]]
    _expect("sequence loss", sequence_loss(s, [[0], [0], [1]], [0, 0, 1]), 4.1 / 3)
    # token 1 masked: sequence 0 is 2 * .75 = 1.5; (1.5 + 1.6)/2
    _expect("masked sequence loss", sequence_loss(s, [[0], [0], [1]], [0, 0, 1], [1, 0, 1]), 1.55)
    _expect("empty sequence loss", sequence_loss(s, [[0], [0], [1]], [0, 0, 1], [0, 0, 0]), 0.0)

    # one token, two experts, f = (1 0), equal logits: p = (1/2 1/2)
    #   softmax: 2 * p_0 (1 - p_0) = 1/2
    #   sigmoid at 0: d = 1/4, dp_0/dz_0 = (1 - 1/2) (1/4) / 1 = 1/8, times 2 = 1/4 ; raw: 2 d = 1/2
    #   sqrt_softplus at ln(e - 1): s = 1, d = (1 - 1/e)/2, dp_0/dz_0 = (1/2) d / 2, times 2 = d/2
    d = (1 - 1 / math.e) / 2
    for gradient in (
        lambda z, gate, normalise: load_balancing_gradient(z, [1, 0], gate, None, normalise),
        lambda z, gate, normalise: sequence_gradient(z, [[0]], [0], gate, None, normalise),
    ):
        _expect("softmax gradient", gradient([[0.0, 0.0]], "softmax", True), [[0.5, -0.5]])
        _expect("sigmoid gradient", gradient([[0.0, 0.0]], "sigmoid", True), [[0.25, -0.25]])
        _expect("raw gradient", gradient([[0.0, 0.0]], "sigmoid", False), [[0.5, 0.0]])
        _expect("sqrt_softplus gradient", gradient([[z1, z1]], "sqrt_softplus", True), [[d / 2, -d / 2]])

    # against central differences, and the two ways of writing the derivative against each other
    random.seed(0)
    logits = [[random.gauss(0, 2) for _ in range(5)] for _ in range(9)]
    mask = [1, 1, 0, 1, 1, 1, 1, 0, 1]
    sequences = [0, 0, 0, 2, 2, 2, 5, 5, 5]
    for gate in gates:
        ids, _ = route(logits, 2, gate)
        counts = load(ids, 5, mask)
        for normalise in (True, False):
            pooled = load_balancing_gradient(logits, counts, gate, mask, normalise)
            numeric = numerical_gradient(
                lambda z: load_balancing_loss(scores(z, gate), counts, 2, mask, normalise),  # noqa: B023
                logits,
            )
            _expect(f"{gate} {normalise} numerical", pooled, numeric, 1e-8)
            own = sequence_gradient(logits, ids, sequences, gate, mask, normalise)
            numeric = numerical_gradient(
                lambda z: sequence_loss(scores(z, gate), ids, sequences, mask, normalise),  # noqa: B023
                logits,
            )
            _expect(f"{gate} {normalise} sequence numerical", own, numeric, 1e-8)
            single = sequence_gradient(logits, ids, [0] * 9, gate, mask, normalise)
            _expect(f"{gate} {normalise} one sequence", single, pooled, 1e-14)

            # three micro-batches weighted by their tokens: the same as the whole batch (paper 2, eq. 6)
            parts = [
                {"logits": logits[a:b], "expert_ids": ids[a:b], "mask": mask[a:b]} for a, b in ((0, 2), (2, 3), (3, 9))
            ]
            tokens = [sum(part["mask"]) for part in parts]  # 2, 0, 5
            split = global_batch_gradients(parts, 2, gate, 1.0, [n / sum(tokens) for n in tokens], normalise)
            _expect(f"{gate} {normalise} global", split[0] + split[1] + split[2], pooled, 1e-14)

    # experts 0 | 0 0 1: f̄ = (3/4 1/4); equal logits: 2 (3/4 - 1/4)/4 = 1/4, times .1, times 1/2 = .0125;
    # in the second micro-batch over its 3 tokens
    parts = [
        {"logits": [[0.0, 0.0]], "expert_ids": [[0]]},
        {"logits": [[0.0, 0.0]] * 3, "expert_ids": [[0], [0], [1]], "mask": None},
    ]
    got = global_batch_gradients(parts, 1, "softmax", 0.1, [0.5, 0.5])
    _expect("global by hand", got, [[[0.0125, -0.0125]], [[0.0125 / 3, -0.0125 / 3]] * 3])

    # mean 2: signs - + + +, mean 1/2; errors (2-6)/2 = -2, 1/2, 1/2, 1
    _expect("sign", sign_rule([1.0, 0, 0, 0], [6, 1, 1, 0], 0.1, False), [0.9, 0.1, 0.1, 0.1])
    _expect("centred sign", sign_rule([1.0, 0, 0, 0], [6, 1, 1, 0], 0.1, True), [0.85, 0.05, 0.05, 0.05])
    _expect("sign of zero", sign_rule([0.0, 0, 0], [3, 2, 1], 0.1, False), [-0.1, 0.0, 0.1])
    for center in (False, True):
        got = proportional_rule([1.0, 0, 0, 0], [6, 1, 1, 0], 0.1, center)
        _expect("proportional", got, [0.8, 0.05, 0.05, 0.1])
        _expect("no load, sign", sign_rule([1.0, 2.0], [0, 0], 0.1, center), [1.0, 2.0])
        _expect("no load, proportional", proportional_rule([1.0, 2.0], [0, 0], 0.1, center), [1.0, 2.0])

    # mean 2; deviations 2 0 0 -2, variance 8/4 = 2; shares 1/2 1/4 1/4: H = (1/2 + 2/4 + 2/4) ln 2 = 1.5 ln 2
    counts = [4, 2, 2, 0]
    _expect("max_violation", max_violation(counts), 1.0)
    _expect("min_violation", min_violation(counts), -1.0)
    _expect("coefficient_of_variation", coefficient_of_variation(counts), math.sqrt(2) / 2)
    _expect("entropy", entropy(counts), 1.5 * ln(2))
    _expect("normalised_entropy", normalised_entropy(counts), 0.75)
    _expect("effective_experts", effective_experts(counts), 2**1.5)
    _expect("dead_experts", dead_experts(counts), 1)
    _expect("at balance", [max_violation([3, 3]), min_violation([3, 3]), normalised_entropy([3, 3])], [0, 0, 1])

    # the design's values; m(1) = 0, m(2) = 1/sqrt(pi), m(3) = 3/(2 sqrt(pi)) are known exactly
    for num_experts, wanted in ((8, 1.42), (32, 2.07), (64, 2.34), (256, 2.83)):
        _expect(f"m({num_experts})", round(expected_maximum(num_experts), 2), wanted)
    _expect("m(1)", expected_maximum(1), 0.0)
    _expect("m(2)", expected_maximum(2), 1 / math.sqrt(math.pi))
    _expect("m(3)", expected_maximum(3), 1.5 / math.sqrt(math.pi))
    # two of eight, 300 tokens: sqrt((3/4) / 75) = 1/10
    _expect("sampling_floor", sampling_floor(300, 2, 8), expected_maximum(8) / 10)

    # each domain its own expert: 1 bit. Correction: conditionals have one bin (0), mixture has two bins and
    # n = 1/(1/4/4 + 1/4/4) = 8: + 1/16 nats. A domain without assignments changes nothing.
    apart = [[4, 0], [0, 0], [0, 4]]
    _expect("plug-in", domain_information_plugin(apart), 1.0)
    _expect("corrected", domain_information(apart), 1.0 + 1 / 16 / ln(2))
    # p = (1/2 1/2) and (1 0): mixture (3/4 1/4), H = 2 - (3/4) log2 3; minus (1 + 0)/2.
    # n = 1/(1/8 + 1/32) = 6.4: mixture + 1/12.8 = 5/64 nats, conditionals (1/4 + 0)/2 = 8/64: together -3/64
    uneven = [[1, 1], [8, 0]]
    _expect("plug-in, uneven", domain_information_plugin(uneven), 1.5 - 0.75 * math.log2(3))
    _expect("corrected, uneven", domain_information(uneven), 1.5 - 0.75 * math.log2(3) - 3 / 64 / ln(2))
    _expect("one domain", domain_information([[3, 2, 1]]), 0.0)

    print(f"reference: {_expect.passed} checks passed")


if __name__ == "__main__":
    _self_check()
