"""Configs of other trainers become ours: what has a place is carried over and checked, what has none is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from whitetuner.cli import main
from whitetuner.config.load import load_config
from whitetuner.errors import UserError
from whitetuner.importers import ai_toolkit, musubi, original
from whitetuner.importers.reading import as_toml, document_of, import_config, import_document, report


def job(arch: str = "qwen_image", **process: Any) -> dict[str, Any]:
    """An ai-toolkit job with the keys that its examples have."""
    whole: dict[str, Any] = {
        "type": "sd_trainer",
        "training_folder": "out",
        "trigger_word": "p3r5on",
        "network": {"type": "lora", "linear": 16, "linear_alpha": 8},
        "save": {"dtype": "float16", "save_every": 250, "max_step_saves_to_keep": 4},
        "datasets": [
            {"folder_path": "/data/cats", "caption_ext": "txt", "caption_dropout_rate": 0.05, "resolution": [512, 1024]}
        ],
        "train": {
            "batch_size": 2, "steps": 1500, "gradient_accumulation": 3, "gradient_checkpointing": True, "lr": 5e-5,
            "optimizer": "adamw8bit", "optimizer_params": {"weight_decay": 1e-4}, "timestep_type": "weighted",
            "noise_scheduler": "flowmatch", "train_unet": True, "train_text_encoder": False, "dtype": "bf16",
            "ema_config": {"use_ema": True, "ema_decay": 0.98}, "max_grad_norm": 0.5,
        },
        "model": {"name_or_path": "Qwen/Qwen-Image", "arch": arch, "quantize": True, "qtype": "qfloat8", "low_vram": True},
        "sample": {
            "sample_every": 100, "width": 1024, "height": 768, "prompts": ["a cat", "a dog"], "neg": "blurry",
            "seed": 42, "walk_seed": True, "guidance_scale": 3, "sample_steps": 25,
        },
    }  # fmt: skip
    return {"job": "extension", "config": {"name": "my_cats", "process": [{**whole, **process}]}}


def values(found: Any) -> dict[str, Any]:
    """The values as our own loader reads them back from the written file."""
    config = load_config(None, base=document_values(as_toml(found))).config
    return config.model_dump()


def document_values(text: str) -> dict[str, Any]:
    from whitetuner.config.document import parse

    return parse(text, "test")


def test_an_ai_toolkit_job_says_the_same_here(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job()), encoding="utf-8")
    found = import_config(path)
    said = values(found)
    assert said["run"]["name"] == "my_cats" and said["run"]["steps"] == 1500
    assert said["model"]["family"] == "qwen-image" and said["model"]["path"] == "Qwen/Qwen-Image"
    assert said["data"]["images"] == "/data/cats" and said["data"]["caption_dropout"] == 0.05
    assert said["data"]["resolution"] == [512, 1024] and said["data"]["trigger"] == "p3r5on"
    assert said["method"] | {"kind": "lora", "rank": 16, "alpha": 8.0} == said["method"]
    optimizer = {
        "name": "adamw8bit",
        "lr": 5e-5,
        "weight_decay": 1e-4,
        "gradient_accumulation": 3,
        "ema": 0.98,
    }
    assert said["optimizer"] | optimizer == said["optimizer"]
    assert said["noise"]["timesteps"] == "weighted" and said["memory"]["base"] == "fp8"
    first, second = said["preview"]["prompts"]
    assert (first["text"], first["seed"], second["seed"], first["size"]) == ("a cat", 42, 43, [1024, 768])
    assert first["cfg"] == 3 and first["negative"] == "blurry"


@pytest.mark.parametrize("arch", ai_toolkit.MODELS)
def test_every_model_of_ai_toolkit_that_is_known_loads_here(arch: str) -> None:
    found = import_document(job(arch), "x")
    family, task, _ = ai_toolkit.MODELS[arch]
    assert values(found)["model"] | {"family": family, "task": task} == values(found)["model"]


def test_edits_experts_and_lokr_of_ai_toolkit() -> None:
    sets = [
        {"folder_path": "t", "control_path": ["a", "b"], "num_repeats": 2},
        {"folder_path": "u", "control_path_1": "c"},
    ]
    network = {
        "type": "lokr",
        "lokr_full_rank": True,
        "lokr_factor": 8,
        "linear": 9,
        "network_kwargs": {"x": 1},
    }
    said = values(found := import_document(job("flux2_klein_9b", datasets=sets, network=network), "x"))
    assert said["model"]["task"] == "edit" and said["method"]["full_matrix"] and said["method"]["factor"] == 8
    assert [one["conditions"] for one in said["data"]["sets"]] == [["a", "b"], ["c"]]
    assert said["data"]["sets"][0]["repeats"] == 2
    assert any("network_kwargs" in theirs for theirs, _ in found.left)
    model = {"arch": "wan22_14b_i2v", "model_kwargs": {"train_high_noise": False, "train_low_noise": True}}
    clips = [{"folder_path": "v", "num_frames": 81, "fps": 16}]
    said = values(import_document(job(model=model, datasets=clips), "x"))
    assert said["model"]["options"]["expert"] == "low"
    assert said["data"]["videos"] == "v" and said["data"]["num_frames"] == 81


SCRIPT = """
# bash
accelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 src/musubi_tuner/wan_train_network.py \\
    --task i2v-A14B --dit low.safetensors --dit_high_noise high.safetensors --timestep_boundary 900 \\
    --dataset_config data.toml --sdpa --mixed_precision bf16 --fp8_base --fp8_scaled \\
    --optimizer_type adamw8bit --optimizer_args "weight_decay=0.02" "betas=0.9,0.95" --learning_rate 2e-4 \\
    --gradient_checkpointing --network_module networks.lora_wan --network_dim 32 --network_alpha 16 \\
    --timestep_sampling shift --discrete_flow_shift 5.0 --max_train_epochs 16 --save_every_n_epochs 1 --seed 7 \\
    --network_args loraplus_lr_ratio=4 --blocks_to_swap 20 --output_dir "out folder" --output_name cat
"""
DATA = """
[general]
resolution = [832, 480]
caption_extension = ".txt"
batch_size = 1
enable_bucket = true

[[datasets]]
video_directory = "/v/one"
target_frames = [1, 25, 81]
frame_extraction = "uniform"
frame_sample = 4
num_repeats = 2

[[datasets]]
video_directory = "/v/two"
target_frames = [49]
frame_extraction = "slide"
"""


def test_a_musubi_command_line_and_its_data_set(tmp_path: Path) -> None:
    (tmp_path / "train.sh").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "data.toml").write_text(DATA, encoding="utf-8")
    found = import_config(tmp_path / "train.sh")
    said = values(found)
    assert said["model"] | {"family": "wan", "task": "i2v", "transformer": "low.safetensors"} == said["model"]
    assert said["model"]["transformer_2"] == "high.safetensors"
    assert said["model"]["options"] == {"expert": "both", "boundary": 0.9}
    assert said["run"] | {"epochs": 16, "seed": 7, "name": "cat", "output_dir": "out folder"} == said["run"]
    assert said["method"] | {"kind": "lora", "rank": 32, "alpha": 16.0} == said["method"]
    assert said["optimizer"]["lora_plus"] == 4.0
    assert said["optimizer"]["weight_decay"] == 0.02 and said["optimizer"]["lr"] == 2e-4
    assert said["memory"]["blocks_to_swap"] == 20 and said["memory"]["base"] == "fp8"
    one, _ = said["data"]["sets"]
    assert one["videos"] == "/v/one" and one["num_frames"] == [1, 25, 81] and one["clips"] == "uniform"
    assert one["resolution"] == round((832 * 480) ** 0.5) and one["repeats"] == 2
    left = dict(found.left)
    assert any("slide" in theirs for theirs in left) and any(
        "save_every_n_epochs" in theirs for theirs in left
    )
    assert any("betas" in theirs for theirs in left)
    assert "# not carried over: save_every_n_epochs = 1" in as_toml(found)


@pytest.mark.parametrize(
    "text",
    [
        "python qwen_image_train_network.py ^\n --dit d ^\n --model_version edit-2511 "
        "--network_module networks.lokr --network_dim 10000",
        'network_module = "networks.lora_qwen_image"\nmodel_version = "edit-2511"\ndit = "d"\nlearning_rate = "5e-5"\n',
    ],
)
def test_batch_files_and_toml_of_musubi(tmp_path: Path, text: str) -> None:
    path = tmp_path / ("train.toml" if "=" in text.split()[1] else "train.bat")
    path.write_text(text, encoding="utf-8")
    data = tmp_path / "set.toml"
    data.write_text(
        '[[datasets]]\nimage_directory = "t"\ncontrol_directory = "c"\nresolution = 1024\n', encoding="utf-8"
    )
    said = values(import_config(path, data))
    assert said["model"] | {"family": "qwen-image", "task": "edit", "transformer": "d"} == said["model"]
    assert said["model"]["options"] == {"variant": "edit-2511"}
    assert said["data"]["target"] == "t" and said["data"]["conditions"] == ["c"]
    lokr = path.suffix == ".bat"
    assert said["method"]["kind"] == ("lokr" if lokr else "lora") and said["method"]["full_matrix"]


def test_kohyas_subsets() -> None:
    document = {
        "general": {"caption_extension": "caption"},
        "datasets": [
            {
                "resolution": 768,
                "batch_size": 4,
                "subsets": [{"image_dir": "a", "num_repeats": 10}, {"image_dir": "b"}],
            }
        ],
    }
    said = values(import_document({"script": "zimage_train_network.py"}, "x", document))
    assert [one["images"] for one in said["data"]["sets"]] == ["a", "b"] and said["data"]["batch_size"] == 4
    assert said["data"]["sets"][0]["repeats"] == 10 and said["data"]["sets"][1]["caption_ext"] == ".caption"


def test_masks_shuffled_captions_and_regularisation_of_others() -> None:
    sets = [
        {"folder_path": "a", "mask_path": "m", "shuffle_tokens": True, "keep_tokens": 2, "invert_mask": True},
        {"folder_path": "b", "alpha_mask": True, "mask_min_value": 0.3, "is_reg": True},
    ]
    train = {"steps": 9, "reg_weight": 0.5}
    found = import_document(job(datasets=sets, train=train), "x")
    first, second = values(found)["data"]["sets"]
    assert (first["mask_dir"], first["mask_floor"], first["caption_keep"]) == ("m", 0.0, 2)
    assert first["caption_shuffles"] > 0 and first["loss_weight"] == 1
    assert (second["mask_alpha"], second["mask_floor"], second["loss_weight"]) == (True, 0.3, 0.5)
    assert second["caption_shuffles"] == 0
    assert any("invert_mask" in theirs for theirs, _ in found.left)
    (alone,) = values(import_document(job(datasets=sets[1:], train=train), "x"))["data"]["sets"]
    assert alone["loss_weight"] == 0.5, "[data] itself has no such key"

    subsets = [
        {"image_dir": "a", "conditioning_data_dir": "m", "shuffle_caption": True, "keep_tokens": 1},
        {"image_dir": "b", "is_reg": True, "alpha_mask": True},
    ]
    script = {"script": "zimage_train_network.py", "prior_loss_weight": 0.5}
    document = {"datasets": [{"resolution": 512, "subsets": subsets}]}
    first, second = values(import_document({**script, "masked_loss": True}, "x", document))["data"]["sets"]
    assert (first["mask_dir"], first["mask_floor"], first["caption_keep"]) == ("m", 0.0, 1)
    assert (second["loss_weight"], second["mask_alpha"], second["mask_floor"]) == (0.5, True, 0.0)
    found = import_document(script, "x", document)
    assert values(found)["data"]["sets"][0]["mask_dir"] is None, "pictures of conditions, not masks"
    assert any("conditioning_data_dir" in theirs for theirs, _ in found.left)


@pytest.mark.parametrize("script", original.SCRIPTS)
def test_the_originals_command_lines(tmp_path: Path, script: str) -> None:
    path = tmp_path / "start.sh"
    family, task = original.SCRIPTS[script]
    source = {"edit": "--target_folder t --condition_folder a b", "i2v": "--video_folder v --wan_version 2.2"}
    path.write_text(
        f"accelerate launch {script} --model_id /m {source.get(task, '--image_folder i')} --num_train_steps 700 "
        "--timestep_type lognorm_blend --lognorm_alpha 0.6 --shift_scale 3.0 --checkpoint_every_n_steps 100 "
        "--learning_rate 1e-4 --resolution 768 --blocks_to_swap 0 --use_pinned_memory",
        encoding="utf-8",
    )
    said = values(found := import_config(path))
    assert said["model"] | {"family": family, "task": task, "path": "/m"} == said["model"]
    assert said["run"]["steps"] == 700 and said["save"]["every"] == 100
    assert said["noise"] | {"timesteps": "lognorm_blend", "lognorm_alpha": 0.6, "shift": 3.0} == said["noise"]
    assert not found.left


def test_the_originals_json_needs_its_family_said_where_nothing_tells_it() -> None:
    document = {"num_train_steps": 10, "timestep_type": "shift", "image_folder": "i", "n_double_layers": 15}
    assert values(import_document(document, "x"))["model"]["family"] == "zimage-v2"
    del document["n_double_layers"]
    with pytest.raises(UserError, match="--family"):
        import_document(document, "x")
    assert values(import_document(document, "x", family="qwen-image"))["model"]["family"] == "qwen-image"


def test_a_value_that_is_refused_here_stays_behind_with_the_reason() -> None:
    found = import_document(job(train={"lr": 50, "steps": 5, "optimizer": "lion8bit"}), "x")
    left = dict(found.left)
    assert any("optimizer.lr = 50" in theirs for theirs in left) and "lr" not in str(
        found.values.get("optimizer.lr")
    )
    assert "module:Class" in left["train.optimizer = lion8bit"]
    assert "steps" in report(found)


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.yaml", "config: {process: [{model: {arch: sdxl}}]}", "cannot be trained here"),
        ("a.yaml", "a: [", "cannot be read"),
        ("a.yaml", "- 1", "no trainer's config"),
        ("a.json", "{", "cannot be read"),
        ("a.toml", '[[datasets]]\nimage_directory = "x"', "the other half"),
        ("a.sh", "echo hello", "no trainer's config"),
        ("a.sh", 'python wan_train_network.py --dit "x', "cannot be read"),
        ("a.toml", "x = 1", "no trainer's config"),
        ("a.yaml", "config: {process: [{model: {arch: zimage}, train: 5}]}", "not built as"),
        ("a.yaml", "x: !!python/object/apply:os.system [true]", "cannot be read"),
    ],
)
def test_what_is_no_config_is_told(tmp_path: Path, name: str, text: str, words: str, capsys: Any) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert main(["init", "--from", str(path)]) == 2
    assert words in capsys.readouterr().err


def test_the_word_writes_a_config_that_check_reads(tmp_path: Path, capsys: Any) -> None:
    path, out = tmp_path / "job.json", tmp_path / "mine.toml"
    path.write_text(json.dumps(job()), encoding="utf-8")
    assert main(["init", "--from", str(path), "-o", str(out)]) == 0
    assert "carried over" in capsys.readouterr().err
    assert load_config(out).config.run.name == "my_cats"
    assert main(["init", "--from", str(path), "-o", str(out)]) == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(
        {"network", "train", "model", "datasets", "sample", "save", "type", "arch", "steps", "lr", "resolution", "prompts",
         "folder_path", "control_path", "network_kwargs", "samples", "seed", "linear", "num_repeats"})), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(JSON)
def test_nothing_in_a_job_breaks_the_reader(inner: Any) -> None:
    process = inner if isinstance(inner, dict) else {"train": inner}
    document = {"config": {"process": [{"model": {"arch": "zimage"}, **process}]}}
    try:
        load_config(None, base=document_values(as_toml(import_document(document, "x"))))
    except UserError:
        pass


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted({*musubi._ARGUMENTS, *musubi._IDLE})), JSON, max_size=5), JSON)
def test_nothing_in_musubis_arguments_breaks_the_reader(arguments: dict[str, Any], sets: Any) -> None:
    data = {"datasets": sets if isinstance(sets, list) else [sets]}
    try:
        import_document({"script": "wan_train_network.py", **arguments}, "x", data)
    except UserError:
        pass


def test_scripts_are_read_as_text_alone() -> None:
    assert document_of("rm -rf / ; zimage_train_network.py --dit a", "x.sh") == {
        "script": "zimage_train_network.py",
        "dit": "a",
    }
