"""Independent reference for the tests: plain loops over lists of Python floats (float64), `math` only.

Written from the definitions in the design (section 5) and the papers, not from the library, so that a mistake
would have to be made twice to stay hidden. Slow on purpose: one loop per sum in the formula.

Notation, per layer: t a token, e an expert, T tokens, E experts, k experts per token, z logits, s scores,
c_e the number of assignments to expert e, f_e = c_e / sum(c) its share, N the number of unmasked tokens,
P_e the mean over the unmasked tokens of s_te / sum_e s_te (or of the raw s_te when normalise is False).

Inputs are nested lists: logits and scores [T][E], expert_ids [T][k], mask [T] (true for a token that counts;
None: all count), sequence_ids [T], counts [E]. Nothing is changed in place.

Conventions where the definitions are silent: a loss or gradient over no token is 0; a metric of a layer without
assignments is nan (except dead_experts, which is E).

`python tests/helpers/reference.py` runs a self-check against numbers worked out by hand.
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


def scores(logits, score_function):
    """The scores of every token: the score function applied to each row of logits.

    softmax: s = exp(z_e) / sum exp(z) (paper 2, eq. 2); sigmoid: s = 1 / (1 + exp(-z)) (paper 1, eq. 1);
    sqrt_softplus: s = sqrt(ln(1 + exp(z))) (DeepSeek-V4 report).
    """
    rows = []
    for row in logits:
        if score_function == "softmax":
            rows.append(softmax(row))
        elif score_function == "sigmoid":
            rows.append([sigmoid(z) for z in row])
        elif score_function == "sqrt_softplus":
            rows.append([math.sqrt(softplus(z)) for z in row])
        else:
            raise ValueError(f"unknown score function {score_function!r}")
    return rows


def route(logits, k, score_function, bias=None, num_groups=1, top_groups=1, renormalise=False, scale=1.0):
    """The k experts of every token and their weights: (expert_ids [T][k], weights [T][k]).

    Choice (paper 1, eq. 3): the k largest of s_te + b_e, listed by descending choice score, ties to the lower
    index. Group limit (DeepSeek-V3, released code): the experts form num_groups equal consecutive groups; a
    group's value is the sum of its two highest choice scores; experts outside the best top_groups groups have
    the choice score -inf. Weights: the plain scores s_te of the chosen (never s + b), divided by their sum
    over the chosen if renormalise, then times scale.
    """
    all_ids, all_weights = [], []
    for row in scores(logits, score_function):
        num_experts = len(row)
        choice = [row[e] + (0.0 if bias is None else bias[e]) for e in range(num_experts)]

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


def route_multiplied(logits, k, score_function, bias):
    """As route, but the choice is by s_te * (1 + b_e): (expert_ids [T][k], weights [T][k]) (paper 1, eq. 5).

    Listed by descending product, ties to the lower index; the weights are the plain scores s_te of the chosen.
    """
    all_ids, all_weights = [], []
    for row in scores(logits, score_function):
        products = [row[e] * (1.0 + bias[e]) for e in range(len(row))]
        chosen = sorted(range(len(row)), key=lambda e: (-products[e], e))[:k]
        if len(chosen) < k:
            raise ValueError(f"fewer than {k} experts")
        all_ids.append(chosen)
        all_weights.append([row[e] for e in chosen])
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
    tokens sum(c) = k N', so k does not enter again; it is in the signature for clarity only.
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
        sequence_sum = 0.0
        for e in range(num_experts):
            used = sum(1 for t in members for chosen in expert_ids[t] if chosen == e)
            share = used / assignments
            mean_score = 0.0
            for t in members:
                score = scores[t][e]
                if normalise:
                    score = score / sum(scores[t])
                mean_score += score / len(members)
            sequence_sum += share * mean_score
        loss += len(members) / total_tokens * num_experts * sequence_sum
    return loss


def log_sum_exp(row):
    """ln sum_e exp(z_e), shifted by the maximum so that it cannot overflow."""
    top = max(row)
    return top + math.log(sum(math.exp(z - top) for z in row))


def z_loss(logits, mask=None):
    """L = (1/N) sum_t (ln sum_e exp(z_te))^2 over the unmasked tokens (ST-MoE, 2202.08906, eq. 5). 0 without tokens."""
    tokens = 0
    total = 0.0
    for t, row in enumerate(logits):
        if is_counted(mask, t):
            tokens += 1
            total += log_sum_exp(row) ** 2
    return total / tokens if tokens > 0 else 0.0


# ---------------------------------------------------------------------------------------------------------
# gradients with respect to the logits; f is held fixed (a count carries no gradient)


def load_balancing_gradient(logits, counts, score_function, mask=None, normalise=True):
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

    for t, s in enumerate(scores(logits, score_function)):
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
            if score_function == "softmax":
                for i in range(num_experts):
                    same = 1.0 if i == j else 0.0
                    gradient[t][j] += by_score[i] * s[i] * (same - s[j])
            elif score_function == "sigmoid":
                gradient[t][j] = by_score[j] * s[j] * (1.0 - s[j])
            elif s[j] > 0.0:  # sqrt_softplus; the slope tends to 0 where the score underflows to 0
                gradient[t][j] = by_score[j] * sigmoid(logits[t][j]) / (2.0 * s[j])
    return gradient


def sequence_gradient(logits, expert_ids, sequence_ids, score_function, mask=None, normalise=True):
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

        if score_function == "softmax":
            s = softmax(row)
        elif score_function == "sigmoid":
            s = [sigmoid(z) for z in row]
            slope = [math.exp(-abs(z)) / (1.0 + math.exp(-abs(z))) ** 2 for z in row]  # even in z
        elif score_function == "sqrt_softplus":
            s = [math.sqrt(softplus(z)) for z in row]
            slope = [sigmoid(z) / (2.0 * math.sqrt(softplus(z))) if softplus(z) > 0.0 else 0.0 for z in row]
        else:
            raise ValueError(f"unknown score function {score_function!r}")
        total = sum(s)

        for j in range(num_experts):
            for e in range(num_experts):
                same = 1.0 if e == j else 0.0
                if score_function == "softmax":
                    derivative = s[e] * (same - s[j])
                elif normalise:
                    derivative = (same - s[e] / total) * slope[j] / total
                else:
                    derivative = same * slope[j]
                gradient[t][j] += num_experts / total_tokens * share[e] * derivative
    return gradient


def z_loss_gradient(logits, mask=None):
    """dL/dz_te = 2 ln(sum_j exp(z_tj)) softmax(z_t)_e / N of the z-loss; rows of zeros for masked tokens."""
    tokens = sum(1 for t in range(len(logits)) if is_counted(mask, t))
    gradient = []
    for t, row in enumerate(logits):
        if is_counted(mask, t):
            gradient.append([2.0 * log_sum_exp(row) * share / tokens for share in softmax(row)])
        else:
            gradient.append([0.0] * len(row))
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


def global_batch_gradients(micro_batches, k, score_function, coefficient, weights, normalise=True):
    """Exact gradients of the global-batch loss, in two passes: one list of rows for each micro-batch.

    Micro-batch m is a dict with "logits", "expert_ids" and (optional) "mask". First pass: c_e pooled over all
    micro-batches, f̄ = c / sum(c). Second pass: the gradient of weights[m] * coefficient * E sum_e f̄_e P^m_e
    with respect to the logits of m, P^m the mean over the unmasked tokens of m (paper 2, eqs. 4-6). k is the
    number of experts per token and is only checked.
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
        rows = load_balancing_gradient(
            micro_batch["logits"], pooled, score_function, micro_batch.get("mask"), normalise
        )
        gradients.append([[weights[m] * coefficient * value for value in row] for row in rows])
    return gradients


# ---------------------------------------------------------------------------------------------------------
# biases


def balance_signs(counts):
    """sign(c̄ - c_e) = sign(sum(c) - E c_e) of every expert, in integers; all 0 without any load."""
    total = sum(counts)
    signs = []
    for count in counts:
        difference = total - len(counts) * count
        if difference > 0:
            signs.append(1)
        elif difference < 0:
            signs.append(-1)
        else:
            signs.append(0)
    return signs


def sign_rule(bias, counts, rate, center):
    """b_e + rate * (sign(c̄ - c_e) [- mean of the signs if center]); the new bias as a list.

    (Paper 1, algorithm 1; centred: Moonlight, appendix C.) sign(c̄ - c_e) = sign(sum(c) - E c_e), in integers.
    Without any load every sign is 0 and the bias does not move.
    """
    num_experts = len(counts)
    signs = balance_signs(counts)
    mean_sign = sum(signs) / num_experts if center else 0.0
    return [bias[e] + rate * (signs[e] - mean_sign) for e in range(num_experts)]


def proportional_rule(bias, counts, rate, center):
    """b_e + rate * (c̄ - c_e) / c̄; the new bias as a list (paper 1, table 3 and appendix C; design, section 5).

    The errors sum to zero by themselves, so center changes nothing. Without any load the bias stays.
    """
    num_experts = len(counts)
    mean = sum(counts) / num_experts
    if mean == 0:
        return list(bias)
    return [bias[e] + rate * (mean - counts[e]) / mean for e in range(num_experts)]


def rms_rule(bias, counts, rate, center):
    """b_e + rate * (step_e [- mean step if center]), step_e = e_e / sqrt((1/E) sum_e e_e^2), e_e = c̄ - c_e.

    (Su, kexue.fm/archives/10757.) The new bias as a list. The steps are 0 if all errors are 0, so without any
    load the bias stays. The errors sum to zero by themselves, so center changes nothing but the rounding.
    """
    num_experts = len(counts)
    mean = sum(counts) / num_experts
    errors = [mean - count for count in counts]
    root = math.sqrt(sum(error**2 for error in errors) / num_experts)
    steps = [error / root if root > 0.0 else 0.0 for error in errors]
    mean_step = sum(steps) / num_experts if center else 0.0
    return [bias[e] + rate * (steps[e] - mean_step) for e in range(num_experts)]


def multiplicative_rule(bias, counts, rate, center):
    """w_e = 1 + b_e, a factor on the scores: w_e + rate * sign(c̄ - c_e) [then / mean of w if center], minus 1.

    (Paper 1, eq. 5 and table 4.) The new bias w - 1 as a list; for the choice see route_multiplied. A common
    factor does not change the choice, so centring divides. Without any load every sign is 0; center still
    brings the mean of w to 1.
    """
    num_experts = len(counts)
    signs = balance_signs(counts)
    factors = [1.0 + bias[e] + rate * signs[e] for e in range(num_experts)]
    if center:
        mean = sum(factors) / num_experts
        factors = [factor / mean for factor in factors]
    return [factor - 1.0 for factor in factors]


def momentum_rule(bias, momentum, counts, rate, beta, sharpness, center):
    """SMEBU (Arcee Trinity Large, 2602.17004): (bias, momentum), the new ones as lists.

    v_e = (c̄ - c_e) / c̄; d_e = rate * tanh(sharpness * v_e) [- mean of these over the experts if center];
    m_e = beta m_e + (1 - beta) d_e; b_e + m_e. Without any load v = 0: the momentum decays and still moves b.
    """
    num_experts = len(counts)
    mean = sum(counts) / num_experts
    steps = []
    for count in counts:
        violation = (mean - count) / mean if mean > 0 else 0.0
        steps.append(rate * math.tanh(sharpness * violation))
    if center:
        mean_step = sum(steps) / num_experts
        steps = [step - mean_step for step in steps]
    new_momentum = [beta * momentum[e] + (1.0 - beta) * steps[e] for e in range(num_experts)]
    return [bias[e] + new_momentum[e] for e in range(num_experts)], new_momentum


def micro_batch_sign_rule(bias, micro_batch_counts, rate, center):
    """b_e + rate * (step_e [- mean step if center]), step_e the mean over the micro-batches m of sign(c̄_m - c_em).

    micro_batch_counts: the counts [E] of every micro-batch of every rank. One without any assignment is left
    out of the mean; if none is left the bias stays. The new bias as a list.
    """
    num_experts = len(bias)
    kept = 0
    sums = [0] * num_experts
    for counts in micro_batch_counts:
        if sum(counts) > 0:
            kept += 1
            for e, sign in enumerate(balance_signs(counts)):
                sums[e] += sign
    if kept == 0:
        return list(bias)
    mean_step = sum(sums) / (kept * num_experts) if center else 0.0
    return [bias[e] + rate * (sums[e] / kept - mean_step) for e in range(num_experts)]


def rate_at(rate, window, schedule, zero_from):
    """The rate of the window before which `window` windows were closed.

    constant: rate; linear: rate * max(0, 1 - window / zero_from); drop: rate while window < zero_from, then 0.
    """
    if schedule == "constant":
        return rate
    if schedule == "linear":
        return rate * max(0.0, 1.0 - window / zero_from)
    if schedule == "drop":
        return rate if window < zero_from else 0.0
    raise ValueError(f"unknown schedule {schedule!r}")


# ---------------------------------------------------------------------------------------------------------
# quantile balancing (Su, kexue.fm/archives/11619; Kimi K3, 2607.24653, section 2.3.3)
#
# The margin is d_te = alpha_t - (s_te + b_e), where alpha_t is half-way between the k-th and the (k+1)-th largest of
# s_t + b. It is what expert e lacks to reach the threshold of token t, and below 0 for the chosen experts. With fixed
# thresholds, the bias b_e + x lifts expert e above the threshold of the tokens with d_te < x. So x at the k/E quantile
# of its margins gives it its share of the tokens.


def margins(scores, k, bias, mask=None):
    """d_te of the unmasked tokens, [N][E]; there is a (k+1)-th largest only for k < E."""
    rows = []
    for t, row in enumerate(scores):
        if is_counted(mask, t):
            choice = [row[e] + bias[e] for e in range(len(row))]
            largest = sorted(choice, reverse=True)
            alpha = (largest[k - 1] + largest[k]) / 2.0
            rows.append([alpha - value for value in choice])
    return rows


def quantile_gain(counts, k, num_tokens):
    """g_e: the part of a count's deviation from N k / E that is more than chance.

    By chance a count has the variance v = N p (1 - p), p = k/E; the E squared deviations sum to E v in the mean, with
    the standard deviation E v sqrt(2 / (E - 1)). With S their sum, g_e is the larger of 1 - (mean + 3 sd) / S and
    1 - 16 v / deviation_e^2, and at least 0.
    """
    num_experts = len(counts)
    p = k / num_experts
    variance = num_tokens * p * (1.0 - p)
    squares = [(count - num_tokens * p) ** 2 for count in counts]
    limit = num_experts * variance * (1.0 + 3.0 * math.sqrt(2.0 / (num_experts - 1)))
    total = sum(squares)
    gains = []
    for square in squares:
        gain = 0.0
        if total > 0.0:
            gain = max(gain, 1.0 - limit / total)
        if square > 0.0:
            gain = max(gain, 1.0 - 16.0 * variance / square)
        gains.append(gain)
    return gains


def quantile_average(bias, deltas, gain, ema):
    """ema * b_e + (1 - ema) * target_e, target_e = b_e + delta_e less the (lower) median of these over the experts.

    delta_e is 0 where the gain is 0. If all gains are, the bias stays as it is.
    """
    if not any(gain):
        return list(bias)
    num_experts = len(bias)
    targets = [bias[e] + (deltas[e] if gain[e] > 0.0 else 0.0) for e in range(num_experts)]
    median = sorted(targets)[(num_experts - 1) // 2]
    return [ema * bias[e] + (1.0 - ema) * (targets[e] - median) for e in range(num_experts)]


def quantile_rule(scores, k, bias, mask=None, ema=0.0, gain=None):
    """The new bias with delta_e the (floor(q_e) + 1)-th smallest of the margins d_te over the tokens.

    q_e = n_e + g_e (N k / E - n_e), where n_e is the number of tokens that chose e, with a margin below 0. The gain is
    that of the counts n_e if it is not given. The bias stays without tokens and if every expert is chosen (k = E).
    """
    num_experts = len(bias)
    tokens = sum(1 for t in range(len(scores)) if is_counted(mask, t))
    if tokens == 0 or k == num_experts:
        return list(bias)
    rows = margins(scores, k, bias, mask)
    chosen = [sum(1 for row in rows if row[e] < 0.0) for e in range(num_experts)]
    if gain is None:
        gain = quantile_gain(chosen, k, tokens)
    deltas = []
    for e in range(num_experts):
        rank = math.floor(chosen[e] + gain[e] * (tokens * k / num_experts - chosen[e]) + 1e-9)
        deltas.append(sorted(row[e] for row in rows)[rank] if rank < tokens else 0.0)
    return quantile_average(bias, deltas, gain, ema)


def histogram_edges(bins):
    """The bins + 1 edges from -8 to 8, 0 in the middle; bins a power of two, 128 or more.

    r = bins / 128 bins an octave, 64 octaves: 2^(-61+o) (1 + i/r) for o = 0..63 and i = 0..r-1, the first of them
    (2^-61) replaced by 0, and 2^3; below 0 the mirror image.
    """
    if bins < 128 or bins & (bins - 1) != 0:
        raise ValueError(f"{bins} bins are not a power of two from 128 on")
    per_octave = bins // 128
    upper_half = []
    for o in range(64):
        for i in range(per_octave):
            upper_half.append(2.0 ** (-61 + o) * (1.0 + i / per_octave))
    upper_half[0] = 0.0
    upper_half.append(8.0)
    lower_half = [-edge for edge in reversed(upper_half[1:])]
    return lower_half + upper_half


def find_bin(value, edges):
    """The bin j of a value: edges[j] <= value < edges[j+1]. A value beyond the edges falls in the outermost bin."""
    bins = len(edges) - 1
    for j in range(bins):
        if edges[j] <= value < edges[j + 1]:
            return j
    return 0 if value < edges[0] else bins - 1


def quantile_histogram(scores, k, bias, mask=None, bins=128):
    """The histograms of the margins, counts [E][bins], one row per expert; all 0 for k = E, which has no margins."""
    num_experts = len(bias)
    edges = histogram_edges(bins)
    counts = [[0] * bins for _ in range(num_experts)]
    if k == num_experts:
        return counts
    for row in margins(scores, k, bias, mask):
        for e in range(num_experts):
            counts[e][find_bin(row[e], edges)] += 1
    return counts


def quantile_from_histogram(counts, k, num_tokens, bias, ema=0.0, gain=None):
    """As quantile_rule, with delta_e read from the histogram counts [E][bins], at q_e.

    In the first bin whose cumulative count (its own included) exceeds q_e, delta_e is
    lower + (q_e - cumulative count before it) / count in it * (upper - lower); 0 in the two bins next to 0, and 8 if
    there is no such bin.
    """
    num_experts = len(bias)
    if num_tokens == 0 or k == num_experts:
        return list(bias)
    chosen = [sum(row[: len(row) // 2]) for row in counts]
    if gain is None:
        gain = quantile_gain(chosen, k, num_tokens)
    deltas = []
    for e, row in enumerate(counts):
        q = chosen[e] + gain[e] * (num_tokens * k / num_experts - chosen[e])
        edges = histogram_edges(len(row))
        middle = len(row) // 2
        delta = 8.0
        before = 0
        for j, count in enumerate(row):
            if before + count > q:
                delta = edges[j] + (q - before) / count * (edges[j + 1] - edges[j])
                if j in (middle - 1, middle):
                    delta = 0.0
                break
            before += count
        deltas.append(delta)
    return quantile_average(bias, deltas, gain, ema)


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
    """m(E) * sqrt(E / (E - 1)) * sqrt((1 - k/E) / (N k/E)): the MaxVio by chance alone. nan for N = 0.

    Counts that sum to N k are independent ones less their mean, scaled to the variance N p (1 - p), p = k/E: the mean
    of E takes 1/E of their variance. The maximum of values less their mean has the expectation m(E).
    """
    if num_tokens == 0:
        return math.nan
    probability = k / num_experts
    spread = math.sqrt(num_experts / (num_experts - 1)) if num_experts > 1 else 1.0
    return expected_maximum(num_experts) * spread * math.sqrt((1.0 - probability) / (num_tokens * probability))


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


def max_domain_share(counts_by_domain):
    """The largest c_de / n_d, n_d = sum_e c_de, over experts and the domains that have assignments; nan without any."""
    largest = math.nan
    for counts in counts_by_domain:
        for count in counts:
            if sum(counts) > 0 and not count / sum(counts) <= largest:
                largest = count / sum(counts)
    return largest


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


def _expect(name, got, expected, tolerance=1e-12):
    """Fails unless both (numbers or nested lists of numbers) agree to the tolerance."""
    got, expected = _flatten(got), _flatten(expected)
    is_same = len(got) == len(expected) and all(abs(a - b) <= tolerance for a, b in zip(got, expected, strict=True))
    if not is_same:
        raise AssertionError(f"{name}: got {got}, expected {expected}")
    _expect.passed += 1


_expect.passed = 0


def _self_check():
    import random

    ln = math.log
    score_functions = ("softmax", "sigmoid", "sqrt_softplus")

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
    # bias +.85 on expert 1: choice .9 .95, group 0 worth 1.85; listed by choice; weights stay the plain scores
    ids, weights = route(row, 2, "sigmoid", [0, 0.85, 0, 0, 0, 0], 3, 1)
    _expect("bias ids", ids, [[1, 0]])
    _expect("bias weights", weights, [[0.1, 0.9]])
    _expect("ties", route([[0.0, 1.0, 0.0, 1.0]], 3, "softmax")[0], [[1, 3, 0]])

    # times 8 on expert 1: .9 .8 .6 .5 .7 .2, second though + 7 would put it first; times 1/2 on expert 0: .45, out
    ids, weights = route_multiplied(row, 2, "sigmoid", [0, 7.0, 0, 0, 0, 0])
    _expect("multiplied ids", ids, [[0, 1]])
    _expect("multiplied weights", weights, [[0.9, 0.1]])
    ids, weights = route_multiplied(row, 2, "sigmoid", [-0.5, 0, 0, 0, 0, 0])
    _expect("divided ids", ids, [[4, 2]])
    _expect("divided weights", weights, [[0.7, 0.6]])
    _expect("multiplied ties", route_multiplied([[0.0, 1.0, 0.0, 1.0]], 3, "softmax", [0.5] * 4)[0], [[1, 3, 0]])

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

    # ln(1 + 3) = 2 ln 2 and ln(1 + 1) = ln 2: (4 + 1)/2 ln^2 2; softmax (1/4 3/4) and (1/2 1/2):
    # 2 (2 ln 2) (1/4 3/4) / 2 and 2 (ln 2) (1/2 1/2) / 2; far out: 800 + ln 2, no overflow
    z = [[0.0, ln(3)], [0.0, 0.0]]
    _expect("z-loss", z_loss(z), 2.5 * ln(2) ** 2)
    _expect("masked z-loss", z_loss(z, [1, 0]), 4 * ln(2) ** 2)
    _expect("empty z-loss", z_loss(z, [0, 0]), 0.0)
    _expect("large z-loss", z_loss([[800.0, 800.0]]), (800 + ln(2)) ** 2, 1e-9)
    _expect("z-loss gradient", z_loss_gradient(z), [[ln(2) / 2, 1.5 * ln(2)], [ln(2) / 2, ln(2) / 2]])
    _expect("masked z-loss gradient", z_loss_gradient(z, [0, 1]), [[0.0, 0.0], [ln(2), ln(2)]])
    _expect("empty z-loss gradient", z_loss_gradient(z, [0, 0]), [[0.0, 0.0], [0.0, 0.0]])

    # one token, two experts, f = (1 0), equal logits: p = (1/2 1/2)
    #   softmax: 2 * p_0 (1 - p_0) = 1/2
    #   sigmoid at 0: d = 1/4, dp_0/dz_0 = (1 - 1/2) (1/4) / 1 = 1/8, times 2 = 1/4 ; raw: 2 d = 1/2
    #   sqrt_softplus at ln(e - 1): s = 1, d = (1 - 1/e)/2, dp_0/dz_0 = (1/2) d / 2, times 2 = d/2
    d = (1 - 1 / math.e) / 2
    for gradient in (
        lambda z, score_function, normalise: load_balancing_gradient(z, [1, 0], score_function, None, normalise),
        lambda z, score_function, normalise: sequence_gradient(z, [[0]], [0], score_function, None, normalise),
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
    numeric = numerical_gradient(lambda z: z_loss(z, mask), logits)
    _expect("z-loss numerical", z_loss_gradient(logits, mask), numeric, 1e-8)
    for score_function in score_functions:
        ids, _ = route(logits, 2, score_function)
        counts = load(ids, 5, mask)
        for normalise in (True, False):
            pooled = load_balancing_gradient(logits, counts, score_function, mask, normalise)
            numeric = numerical_gradient(
                lambda z: load_balancing_loss(scores(z, score_function), counts, 2, mask, normalise),  # noqa: B023
                logits,
            )
            _expect(f"{score_function} {normalise} numerical", pooled, numeric, 1e-8)
            own = sequence_gradient(logits, ids, sequences, score_function, mask, normalise)
            numeric = numerical_gradient(
                lambda z: sequence_loss(scores(z, score_function), ids, sequences, mask, normalise),  # noqa: B023
                logits,
            )
            _expect(f"{score_function} {normalise} sequence numerical", own, numeric, 1e-8)
            single = sequence_gradient(logits, ids, [0] * 9, score_function, mask, normalise)
            _expect(f"{score_function} {normalise} one sequence", single, pooled, 1e-14)

            # three micro-batches weighted by their tokens: the same as the whole batch (paper 2, eq. 6)
            parts = [
                {"logits": logits[a:b], "expert_ids": ids[a:b], "mask": mask[a:b]} for a, b in ((0, 2), (2, 3), (3, 9))
            ]
            tokens = [sum(part["mask"]) for part in parts]  # 2, 0, 5
            split = global_batch_gradients(parts, 2, score_function, 1.0, [n / sum(tokens) for n in tokens], normalise)
            _expect(f"{score_function} {normalise} global", split[0] + split[1] + split[2], pooled, 1e-14)

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

    # mean 5: errors -5 1 1 3, mean square 36/4 = 9: steps -5/3 1/3 1/3 1, times .3
    for center in (False, True):
        _expect("rms", rms_rule([1.0, 0, 0, 0], [10, 4, 4, 2], 0.3, center), [0.5, 0.1, 0.1, 0.3])
        _expect("rms of zero", rms_rule([1.0, 2.0, 3.0], [7, 7, 7], 0.3, center), [1.0, 2.0, 3.0])
        _expect("no load, rms", rms_rule([1.0, 2.0], [0, 0], 0.3, center), [1.0, 2.0])

    # w 2 1 1 1, signs - + + +: 1.9 1.1 1.1 1.1, mean 1.3: 19/13 and 11/13, less 1;
    # without load 2 1, mean 3/2: 4/3 and 2/3, less 1
    got = multiplicative_rule([1.0, 0, 0, 0], [6, 1, 1, 0], 0.1, False)
    _expect("multiplicative", got, [0.9, 0.1, 0.1, 0.1])
    got = multiplicative_rule([1.0, 0, 0, 0], [6, 1, 1, 0], 0.1, True)
    _expect("centred multiplicative", got, [6 / 13, -2 / 13, -2 / 13, -2 / 13])
    _expect("no load, multiplicative", multiplicative_rule([1.0, 0.0], [0, 0], 0.1, False), [1.0, 0.0])
    _expect("no load, centred", multiplicative_rule([1.0, 0.0], [0, 0], 0.1, True), [1 / 3, -1 / 3])

    # v = -2 1/2 1/2 1; tanh(ln a) = (a^2 - 1)/(a^2 + 1), so with sharpness ln 2 (a = 1/4, sqrt 2, sqrt 2, 2)
    # -15/17 1/3 1/3 3/5, times 5.1: -4.5 1.7 1.7 3.06, mean .49: -4.99 1.21 1.21 2.57;
    # m = .9 (1 0 0 2) + .1 d; b = (1 0 0 0) + m; without load m = .9 (1 0 0 2)
    old = ([1.0, 0, 0, 0], [1.0, 0, 0, 2.0])
    got = momentum_rule(*old, [6, 1, 1, 0], 5.1, 0.9, ln(2), False)
    _expect("momentum", got, [[1.45, 0.17, 0.17, 2.106], [0.45, 0.17, 0.17, 2.106]])
    got = momentum_rule(*old, [6, 1, 1, 0], 5.1, 0.9, ln(2), True)
    _expect("centred momentum", got, [[1.401, 0.121, 0.121, 2.057], [0.401, 0.121, 0.121, 2.057]])
    got = momentum_rule(*old, [0, 0, 0, 0], 5.1, 0.9, ln(2), True)
    _expect("no load, momentum", got, [[1.9, 0, 0, 1.8], [0.9, 0, 0, 1.8]])

    # signs - + + +, none (empty), + - 0 0 (mean 2): sums 0 0 1 1 over two, steps 0 0 1/2 1/2, mean 1/4
    parts = [[6, 1, 1, 0], [0, 0, 0, 0], [1, 3, 2, 2]]
    got = micro_batch_sign_rule([1.0, 0, 0, 0], parts, 0.1, False)
    _expect("micro-batch sign", got, [1.0, 0.0, 0.05, 0.05])
    got = micro_batch_sign_rule([1.0, 0, 0, 0], parts, 0.1, True)
    _expect("centred micro-batch sign", got, [0.975, -0.025, 0.025, 0.025])
    for none in ([], [[0, 0], [0, 0]]):
        _expect("no load, micro-batch sign", micro_batch_sign_rule([1.0, 2.0], none, 0.1, True), [1.0, 2.0])

    # linear to zero at 10: 1, 7/10, 0, then it stays there; the drop comes at 10, not at 9
    got = [rate_at(0.2, window, "linear", 10) for window in (0, 3, 10, 15)]
    _expect("linear rate", got, [0.2, 0.14, 0.0, 0.0])
    _expect("drop", [rate_at(0.2, window, "drop", 10) for window in (0, 9, 10, 15)], [0.2, 0.2, 0.0, 0.0])
    _expect("constant rate", rate_at(0.2, 99, "constant", 10), 0.2)

    # N = 100, k = 1, E = 4: p = 1/4, v = 75/4, sqrt(2 / 3); S = 2 * 225 = 450, limit 75 (1 + 3 sqrt(2/3)) = 258.71
    limit = 75.0 * (1.0 + 3.0 * math.sqrt(2.0 / 3.0))
    _expect("gain of a layer", quantile_gain([40, 10, 25, 25], 1, 100), [1 - limit / 450] * 4)
    #   S = 1200: expert 0 deviates by 30, 16 v / 900 = 1/3; the layer 1 - 258.71/1200 = 0.784
    _expect("gain, collapsed", quantile_gain([55, 15, 15, 15], 1, 100), [1 - limit / 1200] * 4)
    _expect("no gain", [quantile_gain([30, 20, 25, 25], 1, 100), quantile_gain([25] * 4, 1, 100)], [[0.0] * 4] * 2)
    #   one of 401, 400 expected each, v = 400 * (1 - 1/401): its own deviation is 20 sd, the layer's sum not much
    counts = [0] + [401] * 400
    own = 1.0 - 16.0 * (400.0 * 400.0 / 401.0) / 400.0**2
    _expect("gain of an expert", quantile_gain(counts, 1, 400 * 401)[0], own)
    _expect("gain of the others", quantile_gain(counts, 1, 400 * 401)[1:], [0.0] * 400)

    # s + b of the tokens, b = (0 0 1/4):  3/4 1/2 3/8 | 7/8 3/8 3/4 | 1/2 1/4 3/8 ; the fourth is masked
    # k = 1, alpha 5/8 | 13/16 | 7/16:  d = -1/8 1/8 1/4 | -1/16 7/16 1/16 | -1/16 3/16 1/16
    #   N k / E = 1, the second smallest of each expert: -1/16 3/16 1/16; b + delta = -1/16 3/16 5/16, median 3/16
    s = [[0.75, 0.5, 0.125], [0.875, 0.375, 0.5], [0.5, 0.25, 0.125], [0.0, 1.0, 0.0]]
    b = [0.0, 0.0, 0.25]
    mask = [1, 1, 1, 0]
    full = [1.0] * 3
    _expect("quantile", quantile_rule(s, 1, b, mask, gain=full), [-0.25, 0.0, 0.125])
    _expect("averaged quantile", quantile_rule(s, 1, b, mask, 0.5, full), [-0.125, 0.0, 0.1875])
    #   three of b and a quarter of that
    _expect("slow quantile", quantile_rule(s, 1, b, mask, 0.75, full), [-1 / 16, 0.0, 7 / 32])
    #   counts 3 0 0; half of the way to 1: 2 1/2 1/2, the third and the smallest: -1/16 1/8 1/16; median 1/8
    _expect("half a quantile", quantile_rule(s, 1, b, mask, gain=[0.5] * 3), [-3 / 16, 0.0, 3 / 16])
    #   only the first expert: b + delta = -1/16 0 1/4, median 0
    _expect("one expert's quantile", quantile_rule(s, 1, b, mask, gain=[1.0, 0.0, 0.0]), [-1 / 16, 0.0, 0.25])
    #   three tokens can be 3 0 0 by chance: v = 2/3, S = 6, below 2 (1 + 3)
    _expect("quantile of chance", quantile_rule(s, 1, b, mask), b)
    #   two tokens, floor(2/3) = 0, the smallest: -1/8 1/8 1/16; b + delta = -1/8 1/8 5/16
    _expect("floored quantile", quantile_rule(s, 1, b, [1, 1, 0, 0], gain=full), [-0.25, 0.0, 3 / 16])
    # k = 2, alpha 7/16 | 9/16 | 5/16:  d = -5/16 -1/16 1/16 | -5/16 3/16 -3/16 | -3/16 1/16 -1/16
    #   N k / E = 2, the third smallest: -3/16 3/16 1/16; b + delta = -3/16 3/16 5/16
    _expect("quantile of two", quantile_rule(s, 2, b, mask, gain=full), [-0.375, 0.0, 0.125])
    _expect("no token, quantile", quantile_rule(s, 1, b, [0] * 4, 0.5), b)
    _expect("all experts, quantile", quantile_rule(s, 3, b, mask, 0.5), b)
    _expect("all experts, histogram", quantile_histogram(s, 3, b, mask, 128), [[0] * 128] * 3)

    # one bin an octave: powers of two from 2^-60 on; two: 4 6 8 at the end, 0 3/2 4/2 6/2 (2^-61) at the start
    powers = [2.0**n for n in range(-60, 4)]
    _expect("128 edges", histogram_edges(128), [-p for p in reversed(powers)] + [0.0] + powers)
    edges = histogram_edges(256)
    _expect("last edges", edges[-5:], [2, 3, 4, 6, 8])
    _expect("first edges", edges[:5], [-8, -6, -4, -3, -2])
    _expect("middle edges", [e * 2**62 for e in edges[125:134]], [-6, -4, -3, 0, 3, 4, 6, 8, 12], 0.0)
    for bins in (128, 256, 512):
        edges = histogram_edges(bins)
        _expect(f"{bins} edges rise", [len(edges), sorted(set(edges)) == edges], [bins + 1, True])

    # 256 bins: 0 is in bin 128 and [4, 6) is bin 128 + 63 * 2 = 254, its mirror 127 - 126 = 1. Below 3/2 2^-61 the bin
    # next to 0, 128 or 127; at it the next, 129, but 127 holds its lower edge; at 8 and beyond the last. 1 =
    # 2^(-61 + 61) is the lower edge of 128 + 122 = 250, -1 that of 128 - 122 = 6; just below 1: 249 and 6
    step = 1.5 * 2.0**-61
    edges = histogram_edges(256)
    for x, low, high in (
        (5.0, 1, 254),
        (5.5, 1, 254),
        (7.0, 0, 255),
        (2.0**-62, 127, 128),
        (2.0**-61, 127, 128),
        (step, 127, 129),
        (1.0, 6, 250),
        (1.0 - 2.0**-40, 6, 249),
        (8.0 - 2.0**-40, 0, 255),
        (8.0, 0, 255),
        (30.0, 0, 255),
    ):
        _expect(f"bins of {x}", [find_bin(-x, edges), find_bin(0.0, edges), find_bin(x, edges)], [low, 128, high])

    # the margins of the three tokens in 128 bins: [1/8, 1/4) is 2^(-61 + 58), bin 64 + 58 = 122; [-1/8, -1/16) is
    # 63 - 57 = 6
    got = quantile_histogram(s, 1, b, mask, 128)
    wanted = [[0] * 128 for _ in range(3)]
    wanted[0][6], wanted[0][7] = 1, 2
    wanted[1][122], wanted[1][123] = 2, 1
    wanted[2][121], wanted[2][123] = 2, 1
    _expect("histogram", got, wanted)
    #   q = 1, not exceeded by a count of 1: [-1/16, -1/32) at its lower end, half of [1/8, 1/4), half of [1/16, 1/8):
    #   b + delta = -1/16 3/16 11/32
    got = quantile_from_histogram(got, 1, 3, b, gain=full)
    _expect("quantile of bins", got, [-1 / 4, 0.0, 5 / 32])
    # q = 5/2. Two in [1/4, 1/2), three in [1/2, 1): 1/2 + (1/2)/3 * 1/2 = 7/12. Four in [-1/2, -1/4), one in [4, 8):
    # -1/2 + (5/2)/4 * 1/4 = -11/32. b + delta = 7/12 and 21/32 = 112/192 and 126/192
    counts = [[0] * 128, [0] * 128]
    counts[0][123], counts[0][124] = 2, 3
    counts[1][4], counts[1][127] = 4, 1
    full = [1.0, 1.0]
    _expect("within bins", quantile_from_histogram(counts, 1, 5, [0.0, 1.0], gain=full), [0.0, 14 / 192])
    got = quantile_from_histogram(counts, 1, 5, [0.0, 1.0], 0.25, full)
    _expect("averaged bins", got, [0.0, 0.25 + 0.75 * 14 / 192])
    #   the second expert has 4 of 5, three quarters of the way to 5/2 are 23/8: -1/2 + (23/8)/4 / 4 = -41/128; the
    #   first 0, 15/8: 1/4 + (15/8)/2 / 4 = 31/64; b + delta = 62/128 and 87/128
    got = quantile_from_histogram(counts, 1, 5, [0.0, 1.0], gain=[0.75, 0.75])
    _expect("part of the way", got, [0.0, 25 / 128])
    _expect("no token, bins", quantile_from_histogram(counts, 1, 0, [0.0, 1.0], 0.25), [0.0, 1.0])
    _expect("all experts, bins", quantile_from_histogram(counts, 2, 5, [0.0, 1.0], 0.25), [0.0, 1.0])
    # q = 2, of two margins none beyond it: 8; of three in [4, 8) two thirds of the way: 20/3
    counts = [[0] * 128, [0] * 128]
    counts[0][64] = 2
    counts[1][127] = 3
    _expect("beyond the bins", quantile_from_histogram(counts, 1, 4, [0.0, 0.0], gain=full), [4 / 3, 0.0])
    # the bins next to 0 do not move: q = 2 lies in bins 64 and 63
    counts[0][64], counts[1][63], counts[1][127] = 4, 4, 0
    _expect("next to 0", quantile_from_histogram(counts, 1, 4, [0.0, 1.0], gain=full), [0.0, 1.0])

    # a common shift of the bias does not change the choice, nor the target; bins no wider than 2^-9 (margins
    # within 1, 256 bins an octave) put delta, and so the median, within 2^-9 of the exact one; floor(N k / E) =
    # floor(200 * 2 / 6) = 66: that many margins of every expert are below its delta
    s = scores([[random.gauss(e / 3, 1) for e in range(6)] for _ in range(230)], "sigmoid")
    mask = [t >= 30 for t in range(230)]
    b = [random.gauss(0, 0.1) for _ in range(6)]
    full = [1.0] * 6
    got = quantile_rule(s, 2, b, mask, gain=full)
    _expect("shifted quantile", quantile_rule(s, 2, [value + 0.3 for value in b], mask, gain=full), got)
    binned = quantile_from_histogram(quantile_histogram(s, 2, b, mask, 2**15), 2, 200, b, gain=full)
    _expect("fine bins", binned, got, 2.0**-8)
    rows = margins(s, 2, b, mask)
    median = sorted(row[0] for row in rows)[66] - (got[0] - b[0])  # what every target has lost to its centring
    for e in range(6):
        delta = got[e] - b[e] + median
        below = sum(1 for row in rows if row[e] < delta - 1e-9)
        up_to = sum(1 for row in rows if row[e] <= delta + 1e-9)
        _expect(f"margins around delta of {e}", [below, up_to], [66, 67])
    # repeated on the same scores it comes close to balance: mean 200/3, so that a violation of .05 is three tokens
    for _ in range(40):
        b = quantile_rule(s, 2, b, mask, gain=full)
    choice = [sorted(range(6), key=lambda e: -(row[e] + b[e]))[:2] for row in s]
    _expect("balance by quantiles", max_violation(load(choice, 6, mask)), 0.0, 0.05)

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
    _expect("sampling_floor", sampling_floor(300, 2, 8), expected_maximum(8) / 10 * math.sqrt(8 / 7))

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
    # shares 3/4 1/4 and 1/2 1/2; a domain without assignments has none
    _expect("largest share", max_domain_share([[3, 1], [0, 0], [50, 50]]), 0.75)

    print(f"reference: {_expect.passed} checks passed")


if __name__ == "__main__":
    _self_check()
