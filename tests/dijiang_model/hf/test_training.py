"""Fine-tuning with transformers: gradients, checkpointed activations, and the libraries around it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.hf.model import DiJiangLM
from tests.dijiang_model.hf.conftest import load
from tests.dijiang_model.stepping import assert_close_in_norm, logits_of, random_text

TEXTS = [f"Question {number}: what follows {number}? Answer: {number + 1}." for number in range(8)]
noisy = pytest.mark.filterwarnings("default")
"""Others' libraries warn of each other's."""


def loss_and_gradients(model: DiJiangLM, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(batch, labels=batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "llama with anchors", "gemma3", "opt"])
def test_checkpointed_activations_give_the_same_gradients(name: str, folders: dict[str, Path]) -> None:
    model = load(folders[name]).train()
    batch = torch.tensor([random_text(40, seed=1), random_text(40, seed=2)])
    loss, gradients = loss_and_gradients(model, batch)
    model.activation_checkpointing_enable()
    again, recomputed = loss_and_gradients(model, batch)
    assert torch.equal(loss, again)
    assert gradients.keys() == recomputed.keys()
    assert not [name for name in gradients if ".linear." in name], "`dijiang train` trains the linear branch"
    assert all(".linear." in name or name in gradients for name, _ in model.named_parameters())
    for part, gradient in gradients.items():
        assert_close_in_norm(recomputed[part], gradient, tolerance=1e-6)


def test_the_loss_of_a_padded_batch_is_that_of_its_texts(folder: Path) -> None:
    model = load(folder)
    short, long = random_text(9, seed=1), random_text(20, seed=2)
    batch = torch.tensor([[0] * 11 + short, long])
    mask = torch.tensor([[0] * 11 + [1] * 9, [1] * 20])
    labels = batch.masked_fill(mask == 0, -100)
    labels[0, 11] = -100  # nothing comes before it
    alone = [model(torch.tensor([text]), labels=torch.tensor([text])).loss * (len(text) - 1) for text in (short, long)]
    together = model(batch, attention_mask=mask, labels=labels).loss
    assert together.item() == pytest.approx(sum(loss.item() for loss in alone) / (8 + 19), rel=1e-5)


def test_the_released_attention_is_not_trained(folders: dict[str, Path]) -> None:
    model = load(folders["gpt_neox as released"])
    with pytest.raises(ValueError, match="inference only"):
        model.train()(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]]))


def trained_folder(model: DiJiangLM, tokenizer: object, folder: Path) -> Path:
    """Five steps of transformers' Trainer, and what it has saved."""
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=5,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        save_steps=5,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    return folder


@noisy
def test_the_trainer_lowers_the_loss_and_saves_what_the_server_loads(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    batch = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    before = model(batch, labels=batch).loss.item()
    out = trained_folder(model, tokenizer, tmp_path / "run")
    model.eval()
    with torch.no_grad():
        after = model(batch, labels=batch)
    assert after.loss.item() < before
    for saved in (out, out / "checkpoint-5"):
        found = logits_of(load_model(saved), batch[0].tolist())
        assert_close_in_norm(found, after.logits[0], tolerance=1e-5)


@noisy
def test_a_run_of_the_trainer_goes_on_from_its_checkpoint(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    rows = [
        {"input_ids": torch.tensor(text), "labels": torch.tensor(text)}
        for text in (random_text(12, seed=i) for i in range(8))
    ]

    def run(steps: int, *, resumed: bool) -> DiJiangLM:
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=steps,
            save_steps=2,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model=load(folder), args=arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2") if resumed else None)
        model: DiJiangLM = trainer.model
        return model

    straight = run(4, resumed=False).state_dict()
    for name, tensor in run(4, resumed=True).state_dict().items():
        assert torch.equal(tensor, straight[name]), name


@noisy
def test_an_adapter_of_peft_is_trained_merged_and_served(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    tokenizer, text = AutoTokenizer.from_pretrained(folder), random_text(20)
    adapted = peft.get_peft_model(load(folder), peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    trained_folder(adapted, tokenizer, tmp_path / "run")
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path / "run").eval()
    with torch.no_grad():
        expected = again(input_ids=torch.tensor([text])).logits[0]
        generated = again.generate(input_ids=torch.tensor([text]), max_new_tokens=5, do_sample=False)
    assert generated.shape[1] > 20
    with torch.no_grad():  # the adapter's folder names its base model
        assert_close_in_norm(load(tmp_path / "run")(torch.tensor([text])).logits[0], expected, tolerance=1e-5)
    assert (expected - logits_of(load_model(folder), text)).norm() > 1e-3 * expected.norm()
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_close_in_norm(logits_of(load_model(tmp_path / "merged"), text), expected, tolerance=1e-5)


@noisy
def test_an_adapter_that_is_not_merged_is_not_saved_as_a_model(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(load(folder), peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    with pytest.raises(Exception, match="merge_and_unload"):
        adapted.get_base_model().save_pretrained(tmp_path / "out")


@noisy
def test_chats_are_learned_with_trl(folder: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}] for text in TEXTS]
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = trl.SFTTrainer(
        model=load(folder),
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"messages": chats}),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer.save_model()
    assert load_model(tmp_path / "run").config.num_layers == 2
