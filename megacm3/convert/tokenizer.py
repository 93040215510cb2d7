"""The text tokenizer of an export as transformers reads it: tokenizer.json, its config, chat template, processor.

Every id of the vocabulary has a name: text pieces, image codes as IMGIMG...Z, specials. Image names stand in the table,
but are no added tokens and no merge makes them: text cannot become an image id.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from megacm3.errors import CheckpointError
from megacm3.files import read_manifest, write_json
from megacm3.tokenizers.text import MODEL, TextTokenizer
from megacm3.tokenizers.vocabulary import Vocabulary, image_name

RELEASED = {"<break>": "<racm3:break>", "<end-of-turn>": "<reserved08706>"}
"""Our names of Chameleon's specials -> those of the released tokenizer."""
_PLAIN = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
_PROBES = (
    "a red apple on a white plate",
    "  Two  spaces, tabs\tand\nlines. ",
    "Digits 1234567890, signs $%&/()=?!",
    "Größe naïve 你好 мир 😀 ✈️ e\u0301",
    "literal \u2581 and \x1a and \x1a1",
    "",
    " ",
)
"""Texts on which both tokenizers must agree before an export is finished."""


def write_tokenizer(folder: Path, text_tokenizer: Path, vocabulary: Vocabulary, length: int, image_size: int) -> None:
    """Write the files of an export.

    image_size: pixels along a picture's side; 0 where the run had no image tokenizer. Raises CheckpointError when
    transformers' tokenizer does not give our ids.
    """
    kind = read_manifest(text_tokenizer, "text_tokenizer").settings["format"]
    if kind == "chameleon":
        tree = _chameleon(text_tokenizer, vocabulary)
    else:
        tree = _sentencepiece(text_tokenizer, vocabulary)
    names = {i: name for name, i in tree["model"]["vocab"].items()}
    tree["post_processor"] = _opening(names[vocabulary.bos], vocabulary.bos)
    write_json(folder / "tokenizer.json", tree)
    if kind != "chameleon":
        # llama.cpp's converter reads pieces and scores from here; transformers prefers tokenizer.json.
        shutil.copyfile(text_tokenizer / MODEL, folder / "tokenizer.model")
    special = {i: names[i] for _, i in vocabulary.special}
    main = {
        "bos_token": names[vocabulary.bos],
        "eos_token": names[vocabulary.eos],
        "pad_token": names[vocabulary.pad],
        "sep_token": names[vocabulary.end_of_turn],  # what Chameleon's processor puts after a prompt
    }
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **main,
        "extra_special_tokens": [name for name in special.values() if name not in main.values()],
        "added_tokens_decoder": {str(i): _PLAIN | {"content": name, "special": True} for i, name in special.items()},
        "add_prefix_space": False,
        "model_max_length": length,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", config)
    template = _TEMPLATE.replace("END", json.dumps(names[vocabulary.end_of_turn]))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    if vocabulary.family == "chameleon" and image_size:
        _write_processor(folder, vocabulary, image_size)
    _check(folder, text_tokenizer)


_TEMPLATE = """{{- bos_token -}}
{%- for message in messages -%}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}{{- part.text -}}{%- else -%}{{- '<image>' -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if not loop.last or add_generation_prompt -%}{{- END -}}{%- endif -%}
{%- endfor -%}
"""
"""Prompt and answers with the end-of-turn token between them, as Chameleon is fine-tuned (2.4)."""


def _opening(name: str, token: int) -> dict[str, Any]:
    """Every text begins with the token that opens a sample."""
    opening = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": side, "type_id": 0}} for side in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [opening, first],
        "pair": [opening, first, second],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}},
    }


def _chameleon(folder: Path, vocabulary: Vocabulary) -> dict[str, Any]:
    from megacm3.tokenizers.chameleon_text import FILE

    tree: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
    table = tree["model"]["vocab"]
    placeholder = dict(vocabulary.special).get("<image>")
    if "<image>" not in table and placeholder is not None:
        # transformers' own converter renames a free slot too.
        table.pop({i: name for name, i in table.items()}.get(placeholder, ""), None)
        table["<image>"] = placeholder
    tree["added_tokens"], tree["truncation"], tree["padding"] = [], None, None
    return tree


def _sentencepiece(folder: Path, vocabulary: Vocabulary) -> dict[str, Any]:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_proto=(folder / MODEL).read_bytes())
    table = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    named = {i: name for name, i in vocabulary.special}
    named |= {int(i): image_name(code) for code, i in enumerate(vocabulary.code_to_id)}
    taken = set(table.values())
    for i in range(vocabulary.size):
        if i not in taken:
            name = named.get(i, f"<unused:{i}>")
            while name in table:
                name = f"<{name}>"
            table[name] = i
    escapes = (("\x1a", "\x1a0"), ("\u2581", "\x1a1"), (" ", "\u2581"))  # as tokenizers/text.py escapes
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": [_replace(*pair) for pair in escapes]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *(_replace(after, before) for before, after in reversed(escapes)),
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": table,
            "merges": _merges(model),
        },
    }


def _replace(before: str, after: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": before}, "content": after}


def _merges(model: Any) -> list[list[str]]:
    """sentencepiece keeps pieces with scores; a merge is any cut of a piece into two others, best piece first."""
    plain = {}
    for i in range(model.get_piece_size()):
        if not (model.is_byte(i) or model.is_unknown(i) or model.is_control(i) or model.is_unused(i)):
            plain[model.id_to_piece(i)] = model.get_score(i)
    merges = [
        (-score, cut, piece[:cut], piece[cut:])
        for piece, score in plain.items()
        for cut in range(1, len(piece))
        if piece[:cut] in plain and piece[cut:] in plain
    ]
    return [[left, right] for _, _, left, right in sorted(merges)]


def _write_processor(folder: Path, vocabulary: Vocabulary, size: int) -> None:
    """Pictures as our tokenizer wants them: x / 255 * 2 - 1 exactly, where transformers' default factor is 0.0078."""
    pixels = {
        "image_processor_type": "ChameleonImageProcessor",
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "rescale_factor": 2 / 255,
        "do_normalize": True,
        "image_mean": [1.0, 1.0, 1.0],
        "image_std": [1.0, 1.0, 1.0],
        "do_convert_rgb": True,
        "resample": 1,
    }
    write_json(folder / "preprocessor_config.json", pixels)
    processor = {"processor_class": "ChameleonProcessor", "image_token": "<image>"}
    write_json(folder / "processor_config.json", processor | {"image_seq_length": vocabulary.image_tokens})


def _check(folder: Path, text_tokenizer: Path) -> None:
    from tokenizers import Tokenizer

    theirs, ours = Tokenizer.from_file(str(folder / "tokenizer.json")), TextTokenizer.load(text_tokenizer)
    for text in _PROBES:
        ids = theirs.encode(text, add_special_tokens=False).ids
        if ids != ours.encode(text) or theirs.decode(ids, skip_special_tokens=False) != ours.decode(ids):
            raise CheckpointError(
                f"transformers' tokenizer would give {ids[:12]} for {text!r}; the run's gives {ours.encode(text)[:12]}"
            )
