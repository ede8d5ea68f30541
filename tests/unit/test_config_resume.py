"""What may change when a run goes on: named and recorded; what may not: refused with the reason."""

from __future__ import annotations

import pytest

from whitetuner.config.load import Loaded, load_config
from whitetuner.config.reference import text
from whitetuner.config.resume import FREE, check_resume
from whitetuner.config.schema import Config
from whitetuner.config.told import field_of, keys_of
from whitetuner.errors import UserError

FORM = {"model.family": "flux2-klein", "data.images": "cat", "run.name": "a"}


def loaded(**changes: object) -> Loaded:
    return load_config(
        None, base={**FORM, **{key.replace("__", "."): value for key, value in changes.items()}}
    )


def test_nothing_changed_nothing_told() -> None:
    assert check_resume(loaded().document(), loaded().config) == []


@pytest.mark.parametrize(
    "change",
    [
        {"run__steps": 3000},
        {"optimizer__lr": 1e-5},
        {"optimizer__schedule": "cosine"},
        {"save__every": 10},
        {"preview__prompts": [{"text": "x"}]},
        {"memory__gradient_checkpointing": True},
        {"memory__device": "cpu"},
        {"data__images": "moved/cat"},
        {"run__epochs": 4},
    ],
)
def test_what_may_change_is_told_in_one_line_each(change: dict[str, object]) -> None:
    (key,) = change
    told = check_resume(loaded().document(), loaded(**change).config)
    assert any(line.startswith(key.replace("__", ".")) for line in told)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"run__seed": 7}, "order and noise follow from the seed"),
        ({"model__path": "other"}, "trained on that model"),
        ({"method__rank": 4}, "what is saved has that shape"),
        ({"method__kind": "lora"}, "what is saved has that shape"),
        ({"data__batch_size": 2}, "follow from the data set"),
        ({"data__resolution": 512}, "follow from the data set"),
        ({"noise__shift": 2.0}, "noise levels seen so far"),
        ({"optimizer__name": "prodigy"}, "saved state of the optimizer"),
        ({"optimizer__gradient_accumulation": 2}, "saved state of the optimizer"),
        ({"validation__sigmas": 9}, "could not be compared"),
    ],
)
def test_what_may_not_change_is_refused_with_the_reason(change: dict[str, object], why: str) -> None:
    with pytest.raises(UserError, match=why) as caught:
        check_resume(loaded().document(), loaded(**change).config)
    (key,) = change
    assert key.replace("__", ".") in str(caught.value)


def test_folders_of_sets_may_move_but_their_weights_may_not_change() -> None:
    def sets(folder: str, repeats: int) -> Loaded:
        return load_config(
            None,
            base={
                "model.family": "flux2-klein",
                "run.name": "a",
                "data.sets": [{"images": folder, "repeats": repeats}],
            },
        )

    assert check_resume(sets("a", 1).document(), sets("b", 1).config) == ["data.sets[0].images: a -> b"]
    with pytest.raises(UserError, match="data set"):
        check_resume(sets("a", 1).document(), sets("a", 2).config)


def test_every_option_is_either_free_or_has_a_reason() -> None:
    """A new section cannot be forgotten here: each key is free, or a word is said about why it is not."""
    from whitetuner.config.resume import _WHY

    for key in keys_of(Config):
        if "." in key:
            free = any(key == one or (one.endswith(".") and key.startswith(one)) for one in FREE)
            assert free or any(key.startswith(one) for one in _WHY), key
    assert all(one.endswith(".") or field_of(one) is not None for one in FREE)
    assert all(f"`{one}`" in text() for one in FREE if not one.endswith(".") and ".sets." not in one)
