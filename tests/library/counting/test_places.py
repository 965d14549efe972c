"""Which tokens of a forward a router call has: tiles, sequence-first models, other tokens, packed sequences."""

import logging
from types import SimpleNamespace

import pytest
import torch
from models import DIM, VOCAB, Block, K, tiny_lm
from torch import nn
from torch.utils.checkpoint import checkpoint
from windows import (
    LAYERS,
    PADDING_MASK,
    SCOPES,
    assert_gradients_close,
    attach_tiny,
    clone_gradients,
    load_sums,
    loss_by_hand,
    random_ids,
    record_calls,
)

from equipoise import EquipoiseError, attach

STRATEGY = "quantile+" + "+".join(f"lbl:scope={scope},coefficient=0.5" for scope in SCOPES)
MASK = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]])  # 12 tokens of 16
IDS = random_ids(length=8)


def _outcome(model, balance, *args, **kwargs):
    """Gradients, loads and biases of one window."""
    (model(*args, **kwargs) + balance.loss()).backward()
    tokens = int(balance.num_tokens)
    balance.step()
    return clone_gradients(model), {n: load.tolist() for n, load in balance.load.items()}, balance.biases, tokens


def _assert_same(outcome, expected):
    assert_gradients_close(outcome[0], expected[0])
    assert list(outcome[1].values()) == list(expected[1].values())
    assert all(torch.equal(a, b) for a, b in zip(outcome[2].values(), expected[2].values(), strict=True))
    assert outcome[3] == expected[3]


# ---- tiles ----


class Tiled(nn.Module):
    """Computes its block in tiles of the sequence, of the flattened tokens, or of rows."""

    def __init__(self, tiles, checkpointed=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.block = nn.Embedding(VOCAB, DIM), Block("softmax")
        self.tiles, self.checkpointed = tiles, checkpointed

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        parts = {"sequence": lambda: x.chunk(4, dim=1), "rows": lambda: x.chunk(2, dim=0), "whole": lambda: [x]}
        parts["uneven"] = lambda: x.split((3, 4, 1), dim=1)
        parts["flat"] = lambda: x.view(-1, DIM).split(5)
        parts = [self._block(part) for part in parts[self.tiles]()]
        y = torch.cat(parts, 0 if self.tiles in ("rows", "flat") else 1).reshape(x.shape)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return (y.square().mean(-1) * mask).sum() / mask.sum()

    def _block(self, part):
        return checkpoint(self.block, part, use_reentrant=False) if self.checkpointed else self.block(part)


WITHOUT_SEQUENCES = STRATEGY.replace("+lbl:scope=sequence,coefficient=0.5", "")


@pytest.mark.parametrize("mask", [None, MASK], ids=["unmasked", "masked"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("tiles", ["sequence", "uneven", "rows", "flat"])
def test_tiles_of_a_block_have_the_masks_and_sequences_of_their_tokens(tiles, checkpointed, mask, caplog):
    strategy = STRATEGY if tiles == "rows" else WITHOUT_SEQUENCES
    whole, model = Tiled("whole").train(), Tiled(tiles, checkpointed).train()
    with caplog.at_level(logging.WARNING, "equipoise"):
        expected = _outcome(whole, attach(whole, strategy), IDS, mask)
        balance = attach(model, strategy)
        outcome = _outcome(model, balance, IDS, mask)
        assert outcome[3] == (16 if mask is None else 12)
        _assert_same(outcome, expected)
        # as a mask that is said, and with the forward's own beside it
        for token_mask in (MASK, MASK.reshape(-1)):
            balance.token_mask(token_mask)
            (model(IDS, torch.ones_like(MASK)) + balance.loss()).backward()
            balance.step()
            assert load_sums(balance) == {"block.gate": K * 12}
    assert not caplog.records


def test_tiles_of_a_forward_that_failed_do_not_continue_in_the_next():
    model = Tiled("sequence").train()
    balance = attach(model, "loss-free")

    def fail(module, args):
        if len(calls) == 2:
            raise RuntimeError("no memory")
        calls.append(1)

    calls = []
    handle = model.block.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        model(IDS, MASK)
    handle.remove()
    model(IDS, MASK)
    balance.step()
    assert load_sums(balance) == {"block.gate": K * 12}


def test_tiles_are_not_ended_by_a_forward_inside_their_own():
    model = Tiled("sequence").train()
    balance = attach(model, "loss-free")
    plain, calls = model._block, []

    def look_ahead_between_two_tiles(part):
        calls.append(part)
        if len(calls) == 2:
            with torch.no_grad():
                model(IDS, MASK)
        return plain(part)

    model._block = look_ahead_between_two_tiles
    model(IDS, MASK)
    balance.step()
    assert len(calls) > 4 and load_sums(balance) == {"block.gate": K * 12}


def test_tokens_that_wait_for_further_tiles_are_in_a_loss_that_is_asked_for_inside_the_forward():
    """Four of the eight tokens of each row are routed: not those of the mask, as far as anybody can know."""
    model = Tiled("whole").train()
    balance, found = attach(model, "lbl"), []

    def forward(input_ids, attention_mask):
        y = model.block(model.embed(input_ids)[:, :4])
        found.extend([balance.loss(), int(balance.num_tokens)])
        return y.sum() + found[0]

    model.forward = forward
    model(IDS, MASK).backward()
    assert found[1] == 8 and found[0] > 0


class Picked(nn.Module):
    """Flattens parts of the sequence where nothing shows which tokens they are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.block = nn.Embedding(VOCAB, DIM), Block("softmax")

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids).detach()
        return sum(self.block(x[:, part].reshape(-1, DIM)).sum() for part in (slice(0, 4), slice(4, 8)))


def test_flattened_tiles_whose_tokens_cannot_be_known_are_refused():
    model = Picked().train()
    balance = attach(model, "loss-free")
    model(IDS)  # without a mask it does not matter
    with pytest.raises(EquipoiseError, match=r"must show which tokens each part has: block.gate got 8 of 16 tokens"):
        model(IDS, MASK)
    model(IDS[:1], MASK[:1])  # in a single row there is one order only
    balance.step()
    assert load_sums(balance) == {"block.gate": K * (16 + 7)}


# ---- the order of tokens ----


class SequenceFirst(nn.Module):
    """``[sequence, batch, dim]`` inside, ids and mask ``[batch, sequence]``."""

    def __init__(self, form="view", batch_first=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.block = nn.Embedding(VOCAB, DIM), Block("softmax")
        self.norm = nn.LayerNorm(DIM)
        self.form, self.batch_first_inside = form, batch_first

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        x = x if self.batch_first_inside else x.transpose(0, 1)
        x = x.contiguous() * 1.0 if self.form == "view" else x
        if self.form in ("norm", "cast"):  # after the tokens were flattened
            flat = x.reshape(-1, DIM)
            flat = self.norm(flat) if self.form == "norm" else flat.double().float()
            y = self.block(flat).view(x.shape)
        else:
            y = self.block(x)
        y = y if self.batch_first_inside else y.transpose(0, 1)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return (y.square().mean(-1) * mask).sum() / mask.sum()


@pytest.mark.parametrize("form", ["view", "copy", "norm", "cast"])
def test_in_a_sequence_first_model_masks_and_sequences_follow_the_tokens(form):
    expected = SequenceFirst(form, batch_first=True).train()
    model = SequenceFirst(form).train()
    balance, expected_balance = attach(model, STRATEGY), attach(expected, STRATEGY)
    for mask in (MASK, None):
        _assert_same(_outcome(model, balance, IDS, mask), _outcome(expected, expected_balance, IDS, mask))


class Attention(nn.Module):
    """Takes hidden states ``[sequence, batch, dim]``, as attention of torch does unless it is told otherwise."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.block = nn.MultiheadAttention(DIM, 1), Block("softmax")

    def forward(self, x):
        return self.block(x).square().mean()


def test_sequences_of_time_first_hidden_states_are_its_columns():
    model = Attention().train()
    balance = attach(model, "lbl:scope=sequence,coefficient=1")
    x = torch.randn(5, 3, DIM, generator=torch.Generator().manual_seed(0))
    model(x)
    value = float(balance.loss().detach())
    balance.token_mask(None, torch.arange(15) % 3)  # in the order of the tokens, each is alone
    model(x)
    alone = float(balance.loss().detach())
    balance.step()
    rows = Attention().train()
    rows.attention = nn.Identity()
    rows_balance = attach(rows, "lbl:scope=sequence,coefficient=1")
    rows(x.transpose(0, 1))
    assert value == pytest.approx(float(rows_balance.loss().detach()), abs=1e-6)
    assert value != pytest.approx(alone, abs=1e-3)


# ---- other tokens ----


class TextAndImages(nn.Module):
    """The text router gets the tokens of the text, picked out of the sequence; the image router gets patches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.text, self.image = nn.Embedding(VOCAB, DIM), Block("softmax"), Block("softmax")

    def forward(self, input_ids, patches=None, attention_mask=None, **kwargs):
        x = self.embed(input_ids)
        is_text = input_ids > 0
        total = self.text(x[is_text]).square().mean()
        return total if patches is None else total + self.image(patches).square().mean()


@pytest.mark.parametrize("num_images", [2, 1])
def test_picked_tokens_are_not_taken_for_multi_token_prediction(num_images, caplog):
    """With one image in each row, the text has rows x (length - 1) tokens."""
    ids = IDS.clamp_min(1).clone()
    ids[0, 3] = 0
    ids[1, 5 if num_images == 2 else 3] = 0 if num_images == 2 else 1
    model = TextAndImages().train()
    balance = attach(model, "loss-free+lbl")
    with caplog.at_level(logging.WARNING, "equipoise"):
        (model(ids, attention_mask=MASK) + balance.loss()).backward()
        balance.step()
    assert load_sums(balance)["text.gate"] == K * (16 - num_images)
    assert f"text.gate routes {16 - num_images} tokens" in caplog.text and "(2, 8): they belong to other" in caplog.text
    (model(ids.clamp_min(1), attention_mask=MASK) + balance.loss()).backward()  # all are text: the mask fits
    balance.step()
    assert load_sums(balance)["text.gate"] == K * 12


@pytest.mark.parametrize("patches", [1, 4, 7, 9])
def test_a_part_of_a_mask_is_not_applied_to_images_whose_number_divides_it(patches, caplog):
    model = TextAndImages().train()
    balance = attach(model, "loss-free+lbl:scope=sequence")
    images = torch.randn(2, patches, DIM, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING, "equipoise"):
        for _ in range(2):
            (model(IDS.clamp_min(1), images, attention_mask=MASK) + balance.loss()).backward()
            balance.step()
            assert load_sums(balance) == {"text.gate": K * 12, "image.gate": K * 2 * patches}
    (record,) = [record for record in caplog.records if "got no token" not in record.message]
    assert f"image.gate routes {2 * patches} tokens" in record.message


@pytest.mark.parametrize("tiles", ["sequence", "rows", "flat"])
def test_a_measurement_follows_tiles(tiles):
    model = Tiled(tiles).train()
    balance = attach(model, "loss-free")
    model(IDS, MASK)  # with gradients, which show how the tiles lie
    model.eval()
    with torch.no_grad(), balance.measuring() as load:
        model(IDS, MASK)
    assert {n: int(x.sum()) for n, x in load.items()} == {"block.gate": K * 12}
    balance.step()
    assert load_sums(balance) == {"block.gate": K * 12}


class Shared(nn.Module):
    """One router gets the text first, then the images, each picked out of the sequence."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.block = nn.Embedding(VOCAB, DIM), Block("softmax")

    def forward(self, input_ids, attention_mask=None):
        x, is_image = self.embed(input_ids), input_ids < 8
        return self.block(x[~is_image]).square().mean() + self.block(x[is_image]).square().mean()


def test_picked_tokens_that_together_are_all_are_no_tiles(caplog):
    model = Shared().train()
    balance = attach(model, "loss-free+lbl")
    with caplog.at_level(logging.WARNING, "equipoise"):
        (model(IDS, MASK) + balance.loss()).backward()
        balance.step()
    assert load_sums(balance) == {"block.gate": K * 16}
    assert "they belong to other tokens" in caplog.text


class EncoderDecoder(nn.Module):
    """The decoder has no mask of its own, as where only labels are given."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = tiny_lm(), tiny_lm()

    def forward(self, input_ids, attention_mask=None, labels=None):
        return self.encoder(input_ids, attention_mask=attention_mask) + self.decoder(labels)


def test_a_decoder_without_a_mask_does_not_get_that_of_the_encoder():
    model = EncoderDecoder().train()
    balance = attach(model, "loss-free")
    model(IDS, MASK, random_ids(length=8, seed=1))
    balance.step()
    sums = load_sums(balance)
    assert {sums[f"encoder.{name}"] for name in LAYERS} == {K * 12}
    assert {sums[f"decoder.{name}"] for name in LAYERS} == {K * 16}


class MyMTPForCausalLM(Tiled):
    """A whole model whose name says that it has multi-token prediction."""

    def __init__(self):
        super().__init__("sequence")
        self.other = Block("softmax")

    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids, attention_mask) + self.other(self.embed(input_ids)).sum() * 0


def test_a_model_that_is_called_after_multi_token_prediction_does_not_predict_further():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = MyMTPForCausalLM()

        def forward(self, *args):
            return self.module(*args)

    model = Wrapper().train()
    calls = []
    model.module.block.gate.register_forward_hook(lambda m, a, output: calls.append(output[2]))
    balance = attach(model, "loss-free")
    model(IDS, MASK)
    balance.step()
    by_hand = torch.zeros(6, dtype=torch.int64)
    for tile, expert_ids in enumerate(calls):  # two rows of two tokens each
        mask = MASK[:, 2 * tile : 2 * tile + 2].reshape(-1) == 1
        by_hand += torch.bincount(expert_ids[mask].reshape(-1), minlength=6)
    (load,) = [load for name, load in balance.load.items() if name.endswith("block.gate")]
    assert torch.equal(load, by_hand)


# ---- where sequences begin ----


class Packed(nn.Module):
    """Takes what shows the sequences of a row, as models of Transformers do, and uses none of it."""

    def __init__(self):
        super().__init__()
        self.net = tiny_lm()
        self.embed, self.blocks = self.net.embed, self.net.blocks

    def forward(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
        return self.net(input_ids)


# Two rows of seven: sequences of 3 and 4 tokens, and of 2 and 5.
SEQUENCES = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [2, 2, 3, 3, 3, 3, 3]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4]])
BLOCKS = (SEQUENCES[:, :, None] == SEQUENCES[:, None, :])[:, None]
CAUSAL = BLOCKS & torch.ones(7, 7, dtype=torch.bool).tril()
FORMS = {
    "position_ids": {"position_ids": POSITIONS},
    "position_ids that begin at 2": {"position_ids": POSITIONS + 2},
    "position_ids with a gap": {"position_ids": POSITIONS + (POSITIONS > 1)},
    "position_ids on three axes": {"position_ids": POSITIONS.expand(3, 2, 7)},
    "segments in the mask": {"attention_mask": torch.tensor([[1, 1, 1, 2, 2, 2, 2], [1, 1, 2, 2, 2, 2, 2]])},
    "falling segments": {"attention_mask": torch.tensor([[9, 9, 9, 2, 2, 2, 2], [5, 5, 1, 1, 1, 1, 1]])},
    "seq_idx": {"seq_idx": SEQUENCES.int()},
    "positions": {"positions": POSITIONS},
    "positions that image tokens share": {"position_ids": POSITIONS.clamp(max=2)},
    "a mask of another name": {"block_mask": BLOCKS},
    "cu_seq_lens": {"cu_seq_lens_q": torch.tensor([0, 3, 7, 9, 14], dtype=torch.int32)},
    "cu_seq_lens as a list": {"cu_seq_lens": [0, 3, 7, 9, 14]},
    "parameters of packed sequences": {
        "packed_seq_params": SimpleNamespace(cu_seqlens_q=torch.tensor([0, 3, 7, 9, 14]))
    },
    "a mask of blocks": {"attention_mask": BLOCKS},
    "a mask of blocks without heads": {"attention_mask": BLOCKS[:, 0]},
    "a causal mask of blocks": {"attention_mask": CAUSAL},
    "an additive mask of blocks": {"attention_mask": torch.where(CAUSAL, 0.0, float("-inf"))},
    "a mask by kind of attention": {"attention_mask": {"full_attention": CAUSAL, "sliding_attention": None}},
    "two forms": {"position_ids": POSITIONS, "seq_idx": SEQUENCES},
}


def _sequence_loss(balance):
    value = float(balance.loss().detach())
    balance.step()
    return value


@pytest.mark.parametrize("form", FORMS)
def test_every_visible_form_of_packed_sequences_is_read(form):
    model = Packed().train()
    balance = attach(model, "lbl:scope=sequence,coefficient=0.5")
    calls = record_calls(model.net)
    model(random_ids(), **FORMS[form])
    right = loss_by_hand(calls, {"sequence": 0.5}, sequences=SEQUENCES.reshape(-1).tolist())
    by_row = loss_by_hand(calls, {"sequence": 0.5}, sequences=[0] * 7 + [1] * 7)
    assert _sequence_loss(balance) == pytest.approx(right, abs=1e-5)
    assert abs(right - by_row) > 1e-2
    model(random_ids(), position_ids=torch.arange(7)[None])
    assert _sequence_loss(balance) == pytest.approx(by_row, abs=1e-5)
    balance.token_mask(None, torch.tensor([0] * 7 + [1] * 7))  # what is said outranks what is read
    model(random_ids(), **FORMS[form])
    assert _sequence_loss(balance) == pytest.approx(by_row, abs=1e-5)


def test_segments_with_padding_and_a_mask_with_a_hole():
    model = Packed().train()
    balance = attach(model, "lbl:scope=sequence,coefficient=0.5")
    calls = record_calls(model.net)
    for mask, sequences in (
        ([[1, 1, 2, 2, 0, 0, 0], [0, 0, 1, 1, 1, 2, 2]], [[0, 0, 1, 1, 1, 1, 1], [9, 9, 2, 2, 2, 3, 3]]),
        ([[1, 1, 0, 0, 1, 1, 0], [0, 1, 1, 0, 1, 1, 1]], [[0] * 7, [1] * 7]),
    ):
        model(random_ids(), attention_mask=torch.tensor(mask))
        flat_mask = [float(number != 0) for row in mask for number in row]
        right = loss_by_hand(calls, {"sequence": 0.5}, flat_mask, [number for row in sequences for number in row])
        assert _sequence_loss(balance) == pytest.approx(right, abs=1e-5)


def test_an_explicit_mask_keeps_the_sequences_that_the_forward_shows():
    model = Packed().train()
    balance = attach(model, "lbl:scope=sequence,coefficient=0.5")
    calls = record_calls(model.net)
    balance.token_mask(PADDING_MASK)
    model(random_ids(), position_ids=POSITIONS)
    flat = PADDING_MASK.reshape(-1).tolist()
    right = loss_by_hand(calls, {"sequence": 0.5}, flat, SEQUENCES.reshape(-1).tolist())
    assert _sequence_loss(balance) == pytest.approx(right, abs=1e-5)


class Flat(nn.Module):
    """Takes tokens, or hidden states, without rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.block = nn.Embedding(VOCAB, DIM), Block("softmax")

    def forward(self, tokens, grid=None, cu_seqlens=None):
        x = self.embed(tokens) if tokens.dim() == 1 else tokens
        return self.block(x).square().mean()


@pytest.mark.parametrize("hidden", [False, True])
def test_flat_tokens_with_the_ends_of_their_sequences(hidden):
    model = Flat().train()
    balance = attach(model, "lbl:scope=sequence,coefficient=0.5")
    tokens = random_ids(rows=1, length=14)[0]
    tokens = model.embed(tokens) if hidden else tokens
    ends, grid = torch.tensor([0, 3, 7, 9, 14]), torch.ones(3, 3, dtype=torch.int64)
    model(tokens, grid=grid, cu_seqlens=ends)
    value = _sequence_loss(balance)
    balance.token_mask(None, SEQUENCES.reshape(-1))
    model(tokens)
    assert value == pytest.approx(_sequence_loss(balance), abs=1e-6)
    with pytest.raises(ValueError, match="must say which token belongs to which sequence"):
        model(tokens, grid=grid)  # a grid of patches shows no rows


class BlockMask:
    """A mask that only its attention kernel can read."""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_mask", BlockMask()),
        ("seq_idx", torch.zeros(2, 6)),
        ("cu_seq_lens_q", torch.zeros(2, 2, dtype=torch.int32)),
    ],
)
def test_visible_sequences_that_cannot_be_read_are_refused_where_they_matter(name, value):
    model = Packed().train()
    balance = attach(model, "lbl:scope=sequence")
    with pytest.raises(EquipoiseError, match=f"must know where each sequence begins: .* with {name} of"):
        model(random_ids(), **{name: value})
    with balance.paused():
        model(random_ids(), **{name: value})
    model.eval()
    model(random_ids(), **{name: value})
    model.train()
    balance.token_mask(None, SEQUENCES)
    model(random_ids(), **{name: value})
    balance.loss()
    balance.step()
    balance.detach()
    balance = attach(model, "lbl:scope=global_batch")
    model(random_ids(), **{name: value})
    balance.loss()
    balance.step()


def test_packed_sequences_in_a_compiled_graph():
    torch._dynamo.reset()
    model = Packed().train()
    balance = attach(model, "lbl:scope=sequence,coefficient=0.5")
    forward = torch.compile(model, backend="aot_eager", fullgraph=True)
    forward(random_ids(), position_ids=POSITIONS)
    value = _sequence_loss(balance)
    balance.token_mask(None, SEQUENCES)
    model(random_ids())
    assert _sequence_loss(balance) == pytest.approx(value, abs=1e-6)
    assert value > 0


@pytest.mark.parametrize("tiles", ["sequence", "uneven", "flat"])
def test_tiles_that_cut_a_sequence_are_refused_where_sequences_matter(tiles):
    model = Tiled(tiles).train()
    attach(model, "lbl:scope=sequence")
    with pytest.raises(EquipoiseError, match="must have each sequence in one call of a router: block.gate"):
        model(IDS)


def test_packed_sequences_of_tiles():
    whole, model = Tiled("whole").train(), Tiled("rows").train()
    outcomes = []
    for net in (whole, model):
        balance = attach(net, STRATEGY)
        balance.token_mask(MASK, torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [2, 2, 2, 2, 3, 3, 3, 3]]))
        outcomes.append(_outcome(net, balance, IDS))
    _assert_same(outcomes[1], outcomes[0])


def test_a_mask_belongs_to_its_layers_only():
    model, balance = attach_tiny("loss-free")
    balance.token_mask(PADDING_MASK, where=lambda name: name == LAYERS[0])
    model(random_ids())
    balance.step()
    assert load_sums(balance) == {LAYERS[0]: K * 10, LAYERS[1]: K * 14}
