"""Exports in other people's tools: PEFT, TRL, lm-eval (.ci/requirements.txt has them)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megacm3.convert.twin import register
from tests.helpers.peers import peer
from tests.unit.convert.conftest import export_with_tokenizers, exported

pytestmark = pytest.mark.long
Folders = Callable[[str], Path]
ATTENTION = ["q_proj", "k_proj", "v_proj"]


def auto_model(kind: str, folder: Path) -> Any:
    """As users load it; Chameleon through the causal twin."""
    from transformers import AutoModelForCausalLM

    if kind == "chameleon":
        register()
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["opt", "qwen3", "llama", "chameleon"])
def test_a_lora_step(kind: str, folders: Folders, tmp_path: Path) -> None:
    peft = peer("peft")
    model = auto_model(kind, exported(folders(kind), tmp_path))
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=ATTENTION))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    ids = torch.arange(4, 28)[None]  # image ids, in Chameleon's table
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] < float("inf")
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(auto_model(kind, tmp_path / "hf"), tmp_path / "adapter")
    with torch.no_grad():
        adapted, plain = model.eval()(input_ids=ids).logits, auto_model(kind, tmp_path / "hf")(input_ids=ids).logits
        assert torch.allclose(again(input_ids=ids).logits, adapted, atol=1e-5)
        assert not torch.allclose(plain, adapted, atol=1e-2)


@pytest.mark.parametrize("kind", ["opt", "chameleon"])
def test_a_fine_tuning_step_on_ids(kind: str, folders: Folders, tmp_path: Path) -> None:
    """TRL's trainer on samples that are ids already, pictures included: its first loss is ours, and it falls."""
    trl = peer("trl")
    from datasets import Dataset
    from transformers import AutoTokenizer

    with_tokenizers = export_with_tokenizers(tmp_path / "tokenizer")
    folder = with_tokenizers if kind == "opt" else exported(folders(kind), tmp_path)
    rows = [list(range(4, 20 + n)) for n in range(8)]
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "sft"),
        max_steps=3,
        per_device_train_batch_size=8,
        report_to=[],
        use_cpu=True,
        bf16=False,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = trl.SFTTrainer(
        model=auto_model(kind, folder),
        args=settings,
        train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(with_tokenizers),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    model, total = auto_model(kind, folder), 0.0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row])
            total += model(input_ids=ids, labels=ids).loss.item() * (len(row) - 1)
    assert losses[0] == pytest.approx(total / sum(len(row) - 1 for row in rows), rel=1e-3)
    assert losses[2] < losses[0]


TASK = """
task: apples
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["red", "green"]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_lm_eval_on_a_local_task(tmp_path: Path) -> None:
    """lm-eval's `hf` model: its likelihood of each answer is the one that the export's logits give."""
    lm_eval = peer("lm_eval")
    tasks_module = peer("lm_eval.tasks")
    from transformers import AutoTokenizer

    folder = export_with_tokenizers(tmp_path)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    questions = [{"question": f"a {thing} is", "answer": n % 2} for n, thing in enumerate(("house", "cat", "star"))]
    (tasks / "apples.jsonl").write_text("\n".join(json.dumps(row) for row in questions))
    (tasks / "apples.yaml").write_text(TASK.replace("FILE", str(tasks / "apples.jsonl")))
    report = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={folder},dtype=float32",
        tasks=["apples"],
        task_manager=tasks_module.TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        batch_size=1,
    )
    tokenizer, model = AutoTokenizer.from_pretrained(folder), auto_model("opt", folder)

    def likelihood(question: str, answer: str) -> float:
        known = len(tokenizer(question)["input_ids"])
        ids = torch.tensor([tokenizer(f"{question} {answer}")["input_ids"]])
        with torch.no_grad():
            chances = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        return float(chances[known - 1 :].sum())

    samples = sorted(report["samples"]["apples"], key=lambda sample: sample["doc_id"])
    right = 0
    for sample, question in zip(samples, questions, strict=True):
        ours = [likelihood(str(question["question"]), answer) for answer in ("red", "green")]
        theirs = [response[0][0] for response in sample["resps"]]
        assert theirs == pytest.approx(ours, rel=1e-4)
        right += ours.index(max(ours)) == question["answer"]
    assert report["results"]["apples"]["acc,none"] == pytest.approx(right / 3)
