"""Micro-batches of token ids: a pure function of the text, the seed and the step."""

from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Int64

from equipoise.errors import UsageError
from equipoise_lab.train.data import Corpus

__all__ = ["Batches", "MicroBatch"]

DRAWS = {"domains": 0, "sequences": 1, "shuffle": 2}  # first word of each random stream after the seed


class MicroBatch(NamedTuple):
    """What one forward gets."""

    domain: str  # or "mixed"
    input_ids: Int64[torch.Tensor, "sequences length"]


@final
class Batches:
    """Micro-batches as a pure function of (seed, step): there is nothing to save, and any step can be asked for.

    The micro-batches of all ranks and steps are numbered g = (step * micro_batches_per_step + m) * num_ranks + rank.
    With D domains they come in rounds of D: round r = g // D goes through the domains in an order drawn anew, and
    takes of each the next ``sequences_per_micro_batch`` of its endless stream of sequences. In that stream every epoch
    is another permutation of the domain's sequences. So every domain occurs equally often, however long its text is.

    ``shuffled=True`` gives the same sequences in each step, permuted over all its micro-batches and ranks: every
    micro-batch then mixes domains and is called ``mixed``.

    ``balance_batch`` consecutive micro-batches are handed out as one, to be forwarded together, and dealt to the ranks
    so: the sequences of a step and their order stay the same. Of several domains it is called ``mixed``.
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
        for name, value, least in (
            ("sequence_length", sequence_length, 1),
            ("sequences_per_micro_batch", sequences_per_micro_batch, 1),
            ("micro_batches_per_step", micro_batches_per_step, 1),
            ("balance_batch", balance_batch, 1),
            ("num_ranks", num_ranks, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}: got {value}.")
        if micro_batches_per_step % balance_batch:
            raise ValueError(
                f"balance_batch must divide micro_batches_per_step: got {balance_batch} of {micro_batches_per_step}."
            )
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank must be in 0 ... num_ranks - 1: got rank {rank} of {num_ranks}.")
        self._rows = [corpus.sequences(split, domain, sequence_length) for domain in corpus.domains]
        for domain, rows in zip(corpus.domains, self._rows, strict=True):
            if len(rows) < sequences_per_micro_batch:
                raise UsageError(
                    f"A domain must fill a micro-batch of {sequences_per_micro_batch} sequences: {split} of {domain!r} "
                    f"has {len(rows)} of {sequence_length} tokens. Add text, or take fewer or shorter sequences."
                )
        self.domains = corpus.domains
        self.seed, self.shuffled, self.rank, self.num_ranks = seed, shuffled, rank, num_ranks
        self.sequences_per_micro_batch, self.micro_batches_per_step = sequences_per_micro_batch, micro_batches_per_step
        self.balance_batch = balance_batch
        self._epochs: dict[int, tuple[int, np.ndarray]] = {}  # of each domain, the epoch last asked for and its order

    def window(self, step: int) -> list[MicroBatch]:
        """What this rank forwards in ``step`` (from 0), in this order: its micro-batches, ``balance_batch`` as one."""
        if step < 0:
            raise ValueError(f"step must be at least 0: got {step}.")
        num = self.micro_batches_per_step * self.num_ranks
        batches = np.stack([self._addresses(step * num + place) for place in range(num)])  # (num, sequences, 2)
        if self.shuffled:
            pool = batches.reshape(-1, 2)
            batches = pool[self._permutation(len(pool), "shuffle", step)].reshape(batches.shape)
        together = batches.reshape(num // self.balance_batch, -1, 2)
        return [MicroBatch(self._name(batch), self._gather(batch)) for batch in together[self.rank :: self.num_ranks]]

    def _name(self, addresses: Int64[np.ndarray, "sequences 2"]) -> str:
        pure = not self.shuffled and (addresses[:, 0] == addresses[0, 0]).all()
        return self.domains[addresses[0, 0]] if pure else "mixed"

    def _addresses(self, number: int) -> Int64[np.ndarray, "sequences 2"]:
        """(domain, row) of each sequence of the micro-batch with this global number."""
        turn, place = divmod(number, len(self.domains))
        domain = int(self._permutation(len(self.domains), "domains", turn)[place])
        first = turn * self.sequences_per_micro_batch
        rows = [self._row(domain, first + i) for i in range(self.sequences_per_micro_batch)]
        return np.array([(domain, row) for row in rows], np.int64)

    def _row(self, domain: int, index: int) -> int:
        num = len(self._rows[domain])
        epoch, place = divmod(index, num)
        if self._epochs.get(domain, (-1,))[0] != epoch:
            self._epochs[domain] = epoch, self._permutation(num, "sequences", domain, epoch)
        return int(self._epochs[domain][1][place])

    def _permutation(self, num: int, draw: str, *numbers: int) -> Int64[np.ndarray, " num"]:
        # numpy promises that the raw bits never change; of Generator.permutation it does not.
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, DRAWS[draw], *numbers])).random_raw(num)
        return np.argsort(bits, kind="stable")

    def _gather(self, addresses: Int64[np.ndarray, "sequences 2"]) -> Int64[torch.Tensor, "sequences length"]:
        return torch.from_numpy(np.stack([self._rows[domain][row] for domain, row in addresses]).astype(np.int64))
