"""Trainer with the sequence cut: the losses and weights of transformers' own on one process; batches it cannot take."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from seqpar.hf import packed
from tests.hf.models import tiny

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def learnt(*jobs):
    """What tests/hf/train.py prints, by job."""
    command = [sys.executable, "-m", "tests.hf.train", *jobs]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("learnt")]
    return {row["job"]: row for row in rows}


def on(processes, jobs):
    return [f"{each}:{job}" for each in processes for job in jobs]


def same(one, other):
    assert len(one["losses"]) == len(other["losses"])
    assert one["losses"] == pytest.approx(other["losses"], rel=1e-5)
    assert one["evaluated"] == pytest.approx(other["evaluated"], rel=1e-5)
    assert one["weights"] == pytest.approx(other["weights"], rel=1e-6)


def test_two_processes_train_as_one_and_as_transformers():
    jobs = ("llama,lora,steps=2", "llama,resume,steps=2", "llama,loop,steps=2")
    found = learnt(*on((1, 2), jobs), "1:llama,stock,steps=2")
    for job in jobs:
        same(found[f"2:{job}"], found[f"1:{job}"])
    same(found["2:llama,resume,steps=2"], found["1:llama,stock,steps=2"])


JOBS = ("llama", "qwen3_next", "llama,lora", "qwen3_next,lora", "llama,resume", "llama,loop")
REPLICAS = ("llama", "llama,fsdp", "llama,lora", "qwen3_next,fsdp")


@pytest.fixture(scope="module")
def long_runs():
    """20 steps of each job."""
    return learnt(*on((1, 2), JOBS), "1:llama,stock")


@pytest.mark.nightly
@pytest.mark.parametrize("job", JOBS)
def test_two_processes_train_as_one(long_runs, job):
    same(long_runs[f"2:{job}"], long_runs[f"1:{job}"])


@pytest.mark.nightly
@pytest.mark.parametrize("job", ["llama", "llama,resume"])
def test_one_process_trains_as_ever(long_runs, job):
    """Without a break, which is the same as from a checkpoint."""
    same(long_runs[f"1:{job}"], long_runs["1:llama,stock"])


@pytest.mark.nightly
@pytest.mark.parametrize("job", REPLICAS)
def test_two_replicas_of_two_processes_train_as_one(job):
    """With DDP and with FSDP2; a step of one process has as many batches as those of both replicas."""
    data = "documents=72,evaluated=16"
    one, four = f"1:{job.removesuffix(',fsdp')},accumulate=4,{data}", f"4:{job},pairs,{data}"
    found = learnt(one, four)
    same(found[four], found[one])


@pytest.mark.sampled(2)
@pytest.mark.slow
@pytest.mark.parametrize("lora", ["0", "4"])
def test_the_example_trains_and_saves(lora, tmp_path):
    pytest.importorskip("peft")
    tiny("llama", vocab_size=256).float().save_pretrained(tmp_path / "model")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("to be or not to be, that is the question. " * 40)
    words = ("--model", "model", "--text", "text", "--out", "out", "--tokens", "64", "--steps", "3", "--cpu")
    script = str(ROOT / "examples" / "finetune.py")
    command = [sys.executable, *TORCHRUN, script, *words, "--lora", lora, "--checkpoint"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / "out").glob("*.safetensors"))


def test_the_example_is_short():
    assert len((ROOT / "examples" / "finetune.py").read_text().splitlines()) <= 80


TOKENS = torch.arange(12).reshape(1, 12)
POSITIONS = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3, 4, 5, 6, 7]])


def test_documents_begin_where_positions_do():
    assert packed(TOKENS, position_ids=POSITIONS).lengths == [3, 1, 8]
    assert packed(TOKENS).lengths == [12]


def test_padding_on_the_right_has_no_labels():
    mask = torch.ones(1, 12).index_fill(1, torch.tensor([10, 11]), 0)
    labels = packed(TOKENS, labels=TOKENS, attention_mask=mask).labels
    assert labels.tolist() == [[*range(10), -100, -100]]


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"attention_mask": torch.ones(1, 1, 12, 12)}, "a mask of tokens"),
        ({"attention_mask": torch.ones(1, 12).index_fill(1, torch.tensor([5]), 0)}, "before or between tokens"),
        ({"attention_mask": torch.ones(1, 12).index_fill(1, torch.tensor([0]), 0)}, "before or between tokens"),
        ({"past_key_values": object()}, "no cache"),
        ({"cache": object()}, "no cache"),
        ({"inputs_embeds": torch.ones(1, 12, 4)}, "no embeddings"),
        ({"position_ids": POSITIONS + 1}, "count from 0"),
        ({"position_ids": torch.cat([POSITIONS, TOKENS])}, "packed alike"),
    ],
)
def test_a_batch_that_is_not_packed_is_refused(wrong, why):
    with pytest.raises(ValueError, match=why):
        packed(TOKENS, **wrong)
