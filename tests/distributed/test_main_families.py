"""The five main families on two ranks under DDP and FSDP2: attached at bias zero, the same bits as not attached."""

from functools import cache

import main_families_ranks
import pytest
import torch
from models import FAMILIES
from ranks import run_on_ranks

pytestmark = pytest.mark.xdist_group("ranks")


@cache
def _on_ranks():
    return run_on_ranks(2, main_families_ranks.everything)


@pytest.mark.parametrize("wrapper", main_families_ranks.WRAPPERS)
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_wrapped_family_gives_the_same_bits(name, wrapper):
    for found in _on_ranks():
        assert not isinstance(found, str), found
        plain, attached = found[name, wrapper]
        assert len(plain) == len(attached) > 8
        assert all(map(torch.equal, plain, attached))
