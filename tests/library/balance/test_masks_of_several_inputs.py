"""Models with several kinds of tokens or wrapped modules: to which router a mask belongs."""

import logging

import models
import pytest
import torch
from torch import nn
from windows import PADDING_MASK, load_sums, random_ids

from equipoise import EquipoiseError, attach
from equipoise.nn import MoE


class TextAndImages(nn.Module):
    """One model with two kinds of tokens. The attention_mask is for the text."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, 16)
        self.text, self.image = (MoE(16, 8, 6, 2) for _ in range(2))

    def forward(self, input_ids, pixels, attention_mask=None):
        text, image = self.text(self.embedding(input_ids)), self.image(pixels)
        return text.float().sum() + image.float().sum()


@pytest.mark.parametrize("strategy", ["loss-free:rate=0.1", "lbl:coefficient=1"])
@pytest.mark.parametrize("patches", [2, 9])
def test_the_mask_of_text_tokens_is_not_applied_to_image_tokens(strategy, patches, caplog):
    model = TextAndImages()
    balance = attach(model, strategy)
    pixels = torch.randn(2, patches, 16, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING, "equipoise"):
        for _ in range(2):
            (model(random_ids(), pixels, attention_mask=PADDING_MASK) + balance.loss()).backward()
            balance.step()
            assert {name: int(load.sum()) for name, load in balance.load.items()} == {
                "text.router": 2 * 10,
                "image.router": 2 * 2 * patches,
            }
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == 1 and warnings[0].startswith("step: image.router routes ")


def test_each_kind_of_token_can_have_its_own_mask():
    model = TextAndImages()
    balance = attach(model, "loss-free:rate=0.1")
    pixels, of_images = torch.randn(2, 7, 16), torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0]])
    balance.token_mask(of_images, where=lambda name: name.startswith("image"))
    model(random_ids(), pixels, attention_mask=PADDING_MASK)
    with balance.paused():
        model(random_ids(), pixels)
    balance.loss()
    model(random_ids(), pixels)
    balance.step()
    sums = {name: int(load.sum()) for name, load in balance.load.items()}
    assert sums == {"text.router": 2 * (10 + 14), "image.router": 2 * (6 + 14)}, "a mask must end with its micro-batch"
    balance.token_mask(PADDING_MASK)
    balance.token_mask(None, where=lambda name: name == "image.router")
    model(random_ids(), pixels)
    balance.step()
    sums = {name: int(load.sum()) for name, load in balance.load.items()}
    assert sums == {"text.router": 2 * 10, "image.router": 2 * 14}
    with pytest.raises(ValueError, match=r"where must choose a layer: it chooses none of text.router, image.router"):
        balance.token_mask(PADDING_MASK, where=lambda name: False)
    balance.token_mask(PADDING_MASK, where=lambda name: True)
    with pytest.raises(EquipoiseError, match="no forward followed"):
        balance.loss()


def test_a_mask_for_some_layers_has_its_own_rows():
    model = TextAndImages()
    balance = attach(model, "lbl:scope=sequence")
    pixels = torch.randn(3, 2, 16)
    balance.token_mask(torch.tensor([[1, 0], [1, 1], [1, 1]]), where=lambda name: name.startswith("image"))
    (model(random_ids(), pixels, attention_mask=PADDING_MASK) + balance.loss()).backward()
    balance.step()
    assert {name: int(load.sum()) for name, load in balance.load.items()} == {"text.router": 20, "image.router": 10}


def test_layers_with_other_tokens_share_one_warning(caplog):
    class Tower(TextAndImages):
        def __init__(self):
            super().__init__()
            self.image = nn.Sequential(*(MoE(16, 8, 6, 2) for _ in range(5)))

    model = Tower()
    balance = attach(model, "loss-free")
    with caplog.at_level(logging.WARNING, "equipoise"):
        for _ in range(2):
            model(random_ids(), torch.randn(2, 9, 16), attention_mask=PADDING_MASK)
            balance.step()
    (record,) = caplog.records
    assert "image.0.router, image.1.router, image.2.router ... (5 in all) routes 18 tokens" in record.message


def test_a_call_without_tokens_causes_no_warning(caplog):
    """For example, a batch has no images, and the block loops over the chosen experts."""
    model = TextAndImages()
    model.image.forward = lambda hidden: sum((w.sum() for w in model.image.router(hidden)[1]), torch.zeros(()))
    balance = attach(model, "lbl")
    with caplog.at_level(logging.WARNING, "equipoise"):
        (model(random_ids(), torch.zeros(2, 0, 16)) + balance.loss()).backward()
        balance.step()
    assert not caplog.records


def test_a_decoder_with_its_own_mask_does_not_get_the_mask_of_the_encoder():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = TextAndImages(), TextAndImages()

        def forward(self, input_ids, attention_mask=None, decoder_input_ids=None, decoder_attention_mask=None):
            pixels = torch.zeros(1, 1, 16)
            encoded = self.encoder(input_ids, pixels, attention_mask)
            return encoded + self.decoder(decoder_input_ids, pixels, decoder_attention_mask)

    model = Both()
    balance = attach(model, "loss-free", where=lambda name, router: "text" in name)
    # encoder and decoder are each called with their own ids and mask
    model(random_ids(), PADDING_MASK, random_ids(), torch.ones(2, 7))
    balance.step()
    assert [int(load.sum()) for load in balance.load.values()] == [2 * 10, 2 * 14]
    balance.detach()

    class Bare(Both):
        def forward(self, input_ids, attention_mask=None, decoder_input_ids=None, decoder_attention_mask=None):
            halves = ((self.encoder, input_ids), (self.decoder, decoder_input_ids))
            return sum(half.text(half.embedding(ids)).sum() for half, ids in halves)

    model = Bare()
    for half in (model.encoder, model.decoder):
        half.forward = lambda hidden: hidden  # takes no mask
    balance = attach(model, "loss-free", where=lambda name, router: "text" in name)
    with pytest.raises(EquipoiseError, match="there is a decoder_attention_mask beside it.*token_mask"):
        model(random_ids(), PADDING_MASK, random_ids(), torch.ones(2, 7))
    balance.token_mask(PADDING_MASK, where=lambda name: name.startswith("encoder"))
    balance.token_mask(None, where=lambda name: name.startswith("decoder"))
    model(random_ids(), None, random_ids())
    balance.step()
    assert [int(load.sum()) for load in balance.load.values()] == [2 * 10, 2 * 14]


def test_a_wrapper_does_not_make_an_ambiguous_mask_clear():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.encoder, self.decoder = nn.Embedding(64, 16), MoE(16, 8, 6, 2), MoE(16, 8, 6, 2)

        def forward(self, input_ids, attention_mask=None, decoder_input_ids=None, decoder_attention_mask=None):
            encoded, decoded = (self.embedding(ids) for ids in (input_ids, decoder_input_ids))
            return self.encoder(encoded).sum() + self.decoder(decoded).sum()

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Bare()

        def forward(self, *args, **kwargs):
            return self.net(*args, **kwargs)

    for model in (Bare(), Wrapper()):
        balance = attach(model, "loss-free")
        with pytest.raises(EquipoiseError, match="there is a decoder_attention_mask beside it"):
            model(random_ids(), PADDING_MASK, random_ids(), torch.ones(2, 7))
        model.eval()
        model(random_ids(), PADDING_MASK, random_ids(), torch.ones(2, 7))
        model.train()
        model(random_ids(), decoder_input_ids=random_ids())
        balance.step()
        assert balance.metrics()["tokens"] == 14


def test_under_a_wrapper_without_a_mask_argument_the_inner_module_gives_the_mask():
    """Modules of training frameworks do this: their training_step calls the network."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.moe = nn.Embedding(64, 16), MoE(16, 8, 6, 2)

        def forward(self, tokens, attention_mask=None):
            hidden = self.moe(self.embedding(tokens))
            if self.fails:
                raise RuntimeError("no memory")
            return hidden.sum()

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x):
            return self.net(x)

        def training_step(self, tokens, mask):
            return self.net(tokens, attention_mask=mask)

    model = Wrapper()
    balance = attach(model, "loss-free+lbl:scope=sequence")
    model.net.fails = True
    with pytest.raises(RuntimeError, match="no memory"):
        model.training_step(random_ids(), PADDING_MASK)
    model.net.fails = False
    (model.training_step(random_ids(), PADDING_MASK) + balance.loss()).backward()
    balance.step()
    assert load_sums(balance) == {"net.moe.router": 2 * 10}


def test_an_inner_model_called_by_itself_gives_its_mask():
    """A wrapper, such as a LightningModule, is attached, and its Transformers model is called."""

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = models.family("mixtral")

        def forward(self, batch):
            return self.model(**batch).loss

    ids = random_ids() % 29 + 3
    batch = {"input_ids": ids, "attention_mask": PADDING_MASK, "labels": ids}
    wrapper = Wrapper()
    balance = attach(wrapper, "lbl:scope=sequence")
    (wrapper(batch) + balance.loss()).backward()
    balance.step()
    assert all(load.sum() == 2 * 10 for load in balance.load.values())
    (wrapper.model(**batch).loss + balance.loss()).backward()
    balance.step()
    assert all(load.sum() == 2 * 10 for load in balance.load.values())
