"""ComfyUI's single file of UMT5 carries its tokenizer, a SentencePiece model in a tensor of bytes: it is read from there.

umt5_pieces/: a model of 330 pieces with UMT5's first four, bytes and a table of letters that are the same, and the ids that
sentencepiece 0.2.3 gives; made by its trainer of 3,000 random lines of 44 words.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from whitetuner.config.load import load_config
from whitetuner.errors import UserError
from whitetuner.families import registry
from whitetuner.families.contract import quiet
from whitetuner.families.sentence_pieces import read_pieces, write_tokenizer
from whitetuner.families.wan.encoders import TextEncoder
from whitetuner.family import ModelPaths
from whitetuner.memory.build import Build
from whitetuner.models import model_paths
from whitetuner.records import EncodeInput

PIECES = Path(__file__).parent / "umt5_pieces"
TEXTS = (
    "a cat moves to the right",
    "the red ball, on green hills!",
    "  a  town \u2581 \u00e9\U0001f431 long ",
    "",
)


def field(number: int, value: int | bytes) -> bytes:
    """A field in protobuf's wire format."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes(found) + bytes([value])


def piece(text: str, score: float, kind: int) -> bytes:
    number = varint(2 << 3 | 5) + struct.pack("<f", score)
    return field(1, field(1, text.encode()) + number + field(3, kind))


def model_of(vocabulary: Sequence[tuple[str, float]], kind: int = 1) -> bytes:
    """A SentencePiece model of these pieces, <pad>, </s> and <unk> being what they are. kind: 1 Unigram, 2 BPE."""
    kinds = {"<pad>": 3, "</s>": 3, "<s>": 3, "<unk>": 2}
    pieces = b"".join(piece(text, score, kinds.get(text, 1)) for text, score in vocabulary)
    trained = field(2, field(3, kind) + field(4, 8000) + field(40, 2))
    return pieces + trained + field(3, field(1, b"identity") + field(3, 1)) + field(9, b"of a later release")


def vocabulary_of(folder: Path) -> list[tuple[str, float]]:
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return [(text, score) for text, score in document["model"]["vocab"] if "extra_id" not in text]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("wan") / "model"
    with quiet():
        registry.make_tiny("wan", str(folder), "t2v-2.1")
        yield folder


def test_the_ids_are_sentencepieces_own_but_for_unknown_letters(tmp_path: Path) -> None:
    """Letters that no piece spells are one <unk>, as in the released tokenizer.json; sentencepiece would spell their bytes."""
    raw = (PIECES / "tiny.model").read_bytes()
    said = read_pieces(raw, "here")
    write_tokenizer(tmp_path, raw, len(said.pieces) + 84, "here")
    ours = PreTrainedTokenizerFast.from_pretrained(tmp_path, local_files_only=True)
    assert (ours.pad_token_id, ours.eos_token_id, ours.unk_token_id) == (0, 1, 3)
    for text, ids in json.loads((PIECES / "ids.json").read_text(encoding="utf-8")):
        wanted: list[int] = []
        for number in ids:
            number = 3 if said.pieces[number][2] == 6 else number  # a byte
            if number != 3 or wanted[-1:] != [3]:
                wanted.append(number)
        assert ours(text)["input_ids"] == wanted, text
    assert (
        ours.convert_tokens_to_ids("<extra_id_83>") == len(said.pieces) and len(ours) == len(said.pieces) + 84
    )


def single(model: Path, folder: Path, carried: bytes | None, fp8: bool = False) -> dict[str, str]:
    """The parts of the model with the text encoder as ComfyUI has it, and no tokenizer."""
    folder.mkdir()
    state = load_file(model / "text_encoder" / "model.safetensors")
    state.setdefault("shared.weight", state.pop("encoder.embed_tokens.weight", torch.empty(0)))
    if fp8:
        for name in [one for one in state if one.endswith("q.weight")]:
            state[name] = state[name].to(torch.float8_e4m3fn)
            state[name.replace("weight", "scale_weight")] = torch.tensor(1.0)
        state["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    if carried is not None:
        state["spiece_model"] = torch.frombuffer(bytearray(carried), dtype=torch.uint8)
    save_file(state, folder / "t.safetensors")
    return {
        "text_encoder": str(folder / "t.safetensors"),
        **{p: str(model / p) for p in ("transformer", "vae")},
    }


def paths_of(given: dict[str, str]) -> ModelPaths:
    values = {"run.name": "x", "model.family": "wan", "model.task": "t2v", "data.images": "."}
    return model_paths(load_config(None, base=values | {f"model.{k}": v for k, v in given.items()}).config)


@pytest.mark.parametrize("fp8", [False, True], ids=["fp16", "fp8 scaled"])
def test_a_file_that_carries_it_needs_no_tokenizers_folder(fp8: bool, model: Path, tmp_path: Path) -> None:
    carried = model_of(vocabulary_of(model / "tokenizer"))
    paths = paths_of(single(model, tmp_path / "files", carried, fp8))
    ours, folders = TextEncoder(paths), TextEncoder(ModelPaths(model))
    pipelines = AutoTokenizer.from_pretrained(model / "tokenizer", local_files_only=True)
    words = {"padding": "max_length", "max_length": 40, "truncation": True}
    for text in map(ours.clean, TEXTS):
        wanted = dict(pipelines(text, **words))
        assert dict(ours.tokenizer(text, **words)) == dict(folders.tokenizer(text, **words)) == wanted
    assert paths_of(single(model, tmp_path / "again", carried)).component("tokenizer") != paths.component(
        "tokenizer"
    )


def test_the_scaled_fp8_file_has_the_folders_weights(model: Path, tmp_path: Path) -> None:
    carried = model_of(vocabulary_of(model / "tokenizer"))
    ours = TextEncoder(paths_of(single(model, tmp_path / "files", carried, fp8=True)))
    folders = TextEncoder(ModelPaths(model))
    ours.load(Build()), folders.load(Build())
    mine, theirs = ours._model.state_dict(), folders._model.state_dict()
    assert set(mine) == set(theirs)
    for name, tensor in theirs.items():
        wanted = tensor.to(torch.float8_e4m3fn).to(tensor.dtype) if name.endswith("q.weight") else tensor
        assert torch.equal(mine[name], wanted), name


#: transformers' names -> those of WAN's first release (github.com/Wan-Video/Wan2.1 wan/modules/t5.py).
FIRST_NAMES = (
    (r"^shared|^encoder\.embed_tokens", "token_embedding"),
    (r"^encoder\.final_layer_norm", "norm"),
    (r"^encoder\.block", "blocks"),
    (r"layer\.0\.SelfAttention\.relative_attention_bias", "pos_embedding.embedding"),
    (r"layer\.0\.SelfAttention", "attn"),
    (r"layer\.0\.layer_norm", "norm1"),
    (r"layer\.1\.layer_norm", "norm2"),
    (r"layer\.1\.DenseReluDense\.wi_0", "ffn.gate.0"),
    (r"layer\.1\.DenseReluDense\.wi_1", "ffn.fc1"),
    (r"layer\.1\.DenseReluDense\.wo", "ffn.fc2"),
)


def test_the_text_encoder_is_read_in_the_names_of_the_first_release(model: Path, tmp_path: Path) -> None:
    """Its tokenizer is not in it, and is asked for."""
    given = single(model, tmp_path / "files", None)
    state = {}
    for name, tensor in load_file(given["text_encoder"]).items():
        for pattern, other in FIRST_NAMES:
            name = re.sub(pattern, other, name)
        state[name] = tensor
    assert len(state) == 2 + 2 * 10 and "blocks.1.ffn.gate.0.weight" in state
    save_file(state, given["text_encoder"])
    with pytest.raises(UserError, match="'tokenizer' of WAN is not given"):
        paths_of(given)
    ours = TextEncoder(paths_of(given | {"tokenizer": str(model / "tokenizer")}))
    folders = TextEncoder(ModelPaths(model))
    ours.load(Build()), folders.load(Build())
    assert ours._model.config.num_layers == 2
    said, wanted = (one.encode(EncodeInput(caption="a red ball")) for one in (ours, folders))
    assert torch.equal(said["prompt_embeds"], wanted["prompt_embeds"])


def test_a_file_without_it_is_told_where_the_tokenizer_is_to_be_had(model: Path, tmp_path: Path) -> None:
    given = single(model, tmp_path / "files", None)
    with pytest.raises(UserError, match=r"(?s)'tokenizer' of WAN is not given.*google/umt5-xxl"):
        paths_of(given)
    assert (
        paths_of(given | {"tokenizer": str(model / "tokenizer")}).component("tokenizer")
        == model / "tokenizer"
    )


def test_unknown_letters_have_the_number_that_the_file_says(model: Path, tmp_path: Path) -> None:
    """In UMT5 it is 3, behind <s>; the class of transformers 5 that the folder names says 2 whatever the file says."""
    shutil.copytree(model, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer" / "tokenizer.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    document["model"]["vocab"].insert(2, ["<s>", 0.0])
    document["model"]["unk_id"] = 3
    for one in document["added_tokens"]:
        one["id"] += one["id"] >= 2
    file.write_text(json.dumps(document), encoding="utf-8")
    tokenizer = TextEncoder(ModelPaths(tmp_path / "model")).tokenizer
    assert tokenizer("\U0001f431")["input_ids"][-2:] == [3, 1]


def test_what_is_wrong_with_the_carried_tokenizer_is_told(model: Path, tmp_path: Path) -> None:
    vocabulary = vocabulary_of(model / "tokenizer")
    whole = model_of(vocabulary)
    for number, (carried, said) in enumerate(
        [
            (whole[:-4], "damaged"),
            (b"\xff" * 40, "damaged"),
            (model_of(vocabulary, kind=2), "of a kind"),
            (model_of([one for one in vocabulary if one[0] != "<unk>"]), "of a kind"),
            (model_of([one for one in vocabulary if one[0] != "</s>"]), "has no </s>"),
        ]
    ):
        given = single(model, tmp_path / str(number), carried)
        with pytest.raises(UserError, match=f"(?s)t.safetensors: .*{said}.*model.tokenizer"):
            paths_of(given)


def test_whatever_bytes_are_there_end_in_a_sentence(tmp_path: Path) -> None:
    raw, draw = (PIECES / "tiny.model").read_bytes(), random.Random(3)
    refused = 0
    for _ in range(400):
        spoilt = bytearray(raw)
        for _ in range(draw.randint(1, 4)):
            spoilt[draw.randrange(len(spoilt))] = draw.randrange(256)
        try:
            write_tokenizer(
                tmp_path, bytes(spoilt[: draw.choice([len(raw), draw.randrange(len(raw))])]), 400, "here"
            )
        except UserError:
            refused += 1
    assert refused > 100
