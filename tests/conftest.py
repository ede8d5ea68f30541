"""What holds for every test: one thread, no network, fixed randomness, and which tests run on this machine."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

# Before torch is imported by anything. One thread: sums in one order, and no fight over the cores of a CI machine.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tests read what is printed; those of the other language ask for it.
os.environ["WHITETUNER_LANG"] = "en"
# Runs of the tests must neither show up among the user's nor wait for them.
os.environ["WHITETUNER_STATE"] = tempfile.mkdtemp(prefix="whitetuner-state-")
atexit.register(shutil.rmtree, os.environ["WHITETUNER_STATE"], ignore_errors=True)

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from whitetuner.families import registry  # noqa: E402

# Reproducible, and no failure by a slow moment of the machine.
settings.register_profile("project", deadline=None, derandomize=True, database=None)
settings.load_profile("project")


#: Whole runs over every family. The quick part of the suite walks with the first one, the slow part with all the others:
#: what differs between families is proved for each of them in tests/families, which is quick.
WALKS = {
    "test_training.py",
    "test_edit_run.py",
    "test_memory_run.py",
    "test_demos.py",
    "test_swap_families.py",
}
FIRST = "flux2-klein"
#: In tests/families the quick part proves each family's first variant; that every wrong convention is told takes seconds each.
LONG = "test_every_wrong_convention_is_told"

#: Seconds each, and what they prove is proved in part by quicker ones beside them: the slow part has them.
LEFT_TO_SLOW = {
    "test_every_option_is_reachable_on_every_tab_in_both_languages",
    "test_a_killed_server_comes_back_to_the_same_view_and_the_login_holds",
    "test_200_000_events_open_in_two_seconds",
    "test_five_thousand_pictures_scroll",
    "test_rows_of_prompts_and_sets_come_and_go",
    "test_data_is_looked_at_from_the_form_and_captions_change",
    "test_a_tab_with_two_tasks_shows_what_the_chosen_one_learns_from",
    "test_on_a_phone_nothing_is_wider_than_the_screen",
    "test_folders_are_chosen_in_the_pages_own_list",
    "test_a_config_is_imported_where_it_belongs",
    "test_ten_blocks_are_told_from_five",
    "test_klein_4b_has_a_plan_at_1024_px",
    "test_five_thousand_pictures_are_looked_at_in_seconds_and_paged",
    "test_the_edges_need_a_finished_transformer",
    "test_more_memory_is_never_slower",
    "test_the_stand_ins_do_what_a_foreign_script_asks_of_them",
    "test_it_edits_as_it_is_told_and_does_not_know_the_new_word",
    "test_the_z_image_draws_what_the_captions_say_and_does_not_know_the_new_word",
    "test_white_masks_are_no_masks_to_the_bit",
    "test_two_ranks_learn_what_two_accumulated_masked_batches_teach_to_the_bit",
    "test_two_ranks_learn_what_two_accumulated_batches_teach_to_the_bit",
    "test_stopped_and_resumed_with_masks_is_never_interrupted_wherever_the_masks_lie",
    "test_stopped_and_resumed_with_shuffled_captions_is_never_interrupted",
    "test_the_pace_is_kept_and_a_resumed_run_looks_at_the_same_steps",
    "test_a_run_goes_on_from_its_best_and_so_does_a_fork",
    "test_a_batch_in_pieces_is_measured_in_pieces",
    "test_the_peak_of_a_mixture_is_that_of_its_parts",
    "test_a_model_without_weights_is_measured_alike",
    "test_it_moves_things_as_it_is_told_and_does_not_know_the_new_word",
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A test begins with one thread of torch, and whatever it made of them ends with it: sums stay in one order.

    None leaves this process in the real-time class: a browser that was started out of it held both cores for minutes.
    """
    _one_thread()
    yield
    if hasattr(os, "sched_getscheduler"):
        assert os.sched_getscheduler(0) == os.SCHED_OTHER
    _one_thread()


def _one_thread() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests only with --run-slow or when `-m` speaks of them; gpu and browser tests where there is one."""
    others = [name for name in registry.FAMILIES if name != FIRST]
    for item in items:
        case = getattr(item, "callspec", None)
        beyond_first = case is not None and any(name in case.id for name in others)
        name = item.name.partition("[")[0]
        if name in LEFT_TO_SLOW or (beyond_first and (item.path.name in WALKS or name == LONG)):
            item.add_marker(pytest.mark.slow)
    if not config.getoption("--run-slow") and "slow" not in config.getoption("-m"):
        slow = [item for item in items if "slow" in item.keywords]
        items[:] = [item for item in items if "slow" not in item.keywords]
        config.hook.pytest_deselected(items=slow)
    if any("gpu" in item.keywords for item in items):
        import torch

        if not torch.cuda.is_available():
            _skip(items, "gpu", "needs a CUDA device, and there is none")
    chromium = any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    if not chromium and not os.environ.get("CI"):  # there the tests shall fail rather than be left out unseen
        _skip(items, "browser", "needs Chromium, and there is none")


def _skip(items: list[pytest.Item], mark: str, reason: str) -> None:
    for item in items:
        if mark in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))
