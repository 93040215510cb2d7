"""The tool with --sft: from records to a store that says what it is, and one line for whatever is wrong."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megacm3.data.build import build_stream
from megacm3.data.store import Store, verify_store
from megacm3.errors import ConfigError
from megacm3.resolve import load_config
from megacm3.sft.read import SftOptions
from tests.helpers.tools import run_tool
from tests.unit.sft.helpers import options, picture, read, reasons, samples, write_lines

ROOT = Path(__file__).resolve().parents[3]
EMOJI = ROOT / "examples" / "data"
TASKS = ROOT / "examples" / "configs" / "sft_tasks.yaml"


@pytest.fixture
def records(tmp_path: Path) -> Path:
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    rows = [{"image": f"{n}.png", "question": f"Number {n}?", "answer": f"thing {n}"} for n in range(6)]
    return write_lines(tmp_path / "records.jsonl", rows)


def tool(tokenizers: Path, records: Path, output: Path, *words: object, text: str = "text") -> tuple[int, str]:
    folders = ("--text-tokenizer", tokenizers / text, "--image-tokenizer", tokenizers / "image")
    return run_tool("pretokenize", "--input", records, *folders, "--output", output, "--workers", 1, *words)


def test_a_store_that_says_what_it_is(tokenizers, records, tmp_path, capfd) -> None:
    assert tool(tokenizers, records, tmp_path / "store", "--sft", "vqav2", "--variants", "all") == (0, "")
    store = Store.open(tmp_path / "store")
    facts = store.settings["sft"]
    assert len(store) == 18 and verify_store(store.folder).documents == 18
    assert (facts["name"], facts["way"], facts["family"], facts["split"]) == ("vqav2", "cm3leon", "cm3leon", "train")
    assert facts["tasks"]["vqav2"]["templates"][0] == "Question: {question} Answer: {answer}. <break> {image}"
    # What the manifest keeps is enough to render the same documents again.
    again = SftOptions(**{key: value for key, value in facts.items() if key != "family"})
    assert samples(read(records, again))[0].parts[0].startswith("Question: Number 0?")
    # Run again: nothing to do. With another way: refused, with the difference.
    assert tool(tokenizers, records, tmp_path / "store", "--sft", "vqav2", "--variants", "all") == (0, "")
    assert "finished already" in capfd.readouterr().out
    code, error = tool(tokenizers, records, tmp_path / "store", "--sft", "vqav2", "--way", "image-first")
    assert code == 3 and "was made with sft = " in error
    # The answers stand before their pictures: only masked ones can be learned.
    run = ["model.preset=tiny_cm3leon", "model.vocab_size=1024", "model.sequence_length=256", "data.packing=whole"]
    run += ["objective.sentinels=64", f"data.mixture=[{{store: {store.folder}}}]"]
    assert build_stream(load_config(None, run)).sequence(0).samples
    for override in ("objective.kind=causal", "objective.spans=0"):
        with pytest.raises(ConfigError, match="before their pictures, to be filled in"):
            build_stream(load_config(None, [*run, override]))


def test_flags_are_refused_with_one_line(tokenizers, records, tmp_path) -> None:
    for words, code, message in (
        (("--sft", "vqa2"), 2, "did you mean vqav2"),
        (("--way", "chameleon"), 2, "need --sft TASK"),
        (("--images", tmp_path), 2, "--images is for --sft"),
        (("--sft", "vqav2", "--way", "plain"), 2, "expected cm3leon, image-first, chameleon"),
        (("--sft", "vqav2", "--variants", "two"), 2, "expected cm3leon"),
        (("--sft", "vqav2", "--field", "answer"), 2, "--field answer; expected KEY=VALUE"),
        (("--sft", "vqav2", "--images", tmp_path / "no"), 2, "is no folder"),
        (("--sft", "vqav2", "--max-tokens", -1), 2, "--max-tokens -1"),
        (("--sft", "vqav2", "--sft-tasks", tmp_path / "no.yaml"), 2, "cannot be read"),
    ):
        found, error = tool(tokenizers, records, tmp_path / "store", *words)
        assert found == code and message in error, error
    found, error = tool(tokenizers, records, tmp_path / "store", "--sft", "vqav2", "--way", "cm3leon", text="chameleon")
    assert found == 2 and "no sentinels" in error
    assert not (tmp_path / "store").exists()


def test_records_that_lack_a_field_stop_the_job_by_name(tokenizers, records, tmp_path) -> None:
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    del rows[2]["answer"]
    rows[4]["image"] = 7
    write_lines(records, rows)
    code, error = tool(tokenizers, records, tmp_path / "store", "--sft", "vqav2")
    assert code == 3 and "2 of 6 rows are rejected (1 missing_field, 1 no_image)" in error
    listed = pq.read_table(tmp_path / "store.rejects.parquet").to_pylist()
    assert listed[0]["detail"].startswith("task vqav2 needs answer") and listed[0]["row"] == 2


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_the_emoji_records_are_whole(name: str) -> None:
    path = EMOJI / f"sft-{name}.parquet"
    found = samples(read(path, options("mixed", TASKS)))
    counts = {task: sum(item.task == task for item in found) for task in {item.task for item in found}}
    assert set(counts) == {"emoji-caption", "emoji-question", "emoji-edit", "emoji-image"}
    assert min(counts.values()) > (900 if name == "train" else 150) and not reasons(found)
    asked = [item for item in found if item.task == "emoji-question"]
    answers = {part.strip() for item in asked for part, a in zip(item.parts, item.answers, strict=True) if a}
    assert answers >= {"light", "medium-light", "medium", "medium-dark", "dark", "none", "people & body", "objects"}
    edits = [item for item in found if item.task == "emoji-edit"]
    assert all(item.parts[1] != item.parts[3] and item.answers == (False, False, False, True) for item in edits)


def test_no_figure_is_in_both_splits_and_the_data_is_small() -> None:
    def figures(name: str) -> set[str]:
        keys = pq.read_table(EMOJI / f"sft-{name}.parquet", columns=["key"])["key"].to_pylist()
        tones = tuple(f"1f3f{digit}" for digit in "bcdef")
        ends = [key.replace(">", ":").split(":")[0].split("-") for key in keys]
        return {"-".join(part for part in parts if part not in tones) for parts in ends}

    train, heldout = figures("train"), figures("heldout")
    assert train and heldout and not train & heldout
    assert sum(path.stat().st_size for path in EMOJI.glob("sft-*")) < 4_000_000
    assert sum(path.stat().st_size for path in EMOJI.iterdir()) < 12_000_000


def test_nothing_that_the_quickstart_trains_on_is_held_out_here_nor_the_other_way() -> None:
    import tarfile

    def members(name: str) -> set[str]:
        with tarfile.open(EMOJI / name) as tar:
            return {member.split(".")[0] for member in tar.getnames()}

    def keys(name: str) -> set[str]:
        column = pq.read_table(EMOJI / f"sft-{name}.parquet", columns=["key"])["key"].to_pylist()
        return {key.split(":")[0] for key in column if ":" in key}

    trained = members("train-00000.tar") | members("train-00001.tar")
    assert not keys("heldout") & trained and not keys("train") & members("heldout-00000.tar")
