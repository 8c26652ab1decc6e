"""butterfly_opt.Butterfly inside transformers, Lightning, accelerate, timm, skorch, peft and DeepXDE, where installed.

Oracle: the same steps in a plain loop, bit for bit; and the framework's own checkpoint of the optimizer.
"""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import assert_same, snapshot
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from butterfly_opt import Butterfly, ButterflyW

STEPS, BATCH = 12, 8


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded or reported: the models are built from a configuration."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "WANDB_DISABLED"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("DDE_BACKEND", "pytorch")
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))


def decay(step: int) -> float:
    return 1 - step / (2 * STEPS)


class Samples(Dataset):
    """Inputs and labels of a small classification task, in a fixed order."""

    def __init__(self, size: int = STEPS * BATCH) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(size, 6, generator=generator)
        self.labels = self.inputs[:, :3].argmax(1)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.labels[index]


class Tokens(Dataset):
    """Sentences of 8 tokens for a language model, each token the last one plus one."""

    def __len__(self) -> int:
        return STEPS * BATCH

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = (torch.arange(8) + index) % 16
        return {"input_ids": tokens, "labels": tokens.clone()}


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def train_by_hand(model: nn.Module) -> Butterfly:
    opt = Butterfly(model.parameters(), lr=0.02)
    schedule = LambdaLR(opt, decay)
    for inputs, labels in DataLoader(Samples(), batch_size=BATCH):
        opt.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        opt.step()
        schedule.step()
    return opt


def assert_same_run(model: nn.Module, opt: Any, other: nn.Module, other_opt: Any) -> None:
    assert_same([p.detach() for p in model.parameters()], [p.detach() for p in other.parameters()])
    assert_same(snapshot(opt), snapshot(other_opt))
    assert len(opt.state) == len(list(model.parameters()))


def test_hugging_face_trainer(tmp_path: Path) -> None:
    """``Trainer(optimizers=(opt, scheduler))``: the loss falls, and a resumed run equals the uninterrupted one."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="the Trainer needs it")

    def trainer(folder: Path) -> Any:
        config = transformers.GPT2Config(vocab_size=16, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0,
                                         eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
        transformers.set_seed(0)
        model = transformers.GPT2LMHeadModel(config)
        opt = Butterfly(model.parameters(), lr=1e-2)
        arguments = transformers.TrainingArguments(
            output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH, save_steps=STEPS // 2,
            logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, dataloader_num_workers=0,
        )  # fmt: skip
        return transformers.Trainer(
            model=model, args=arguments, train_dataset=Tokens(), optimizers=(opt, LambdaLR(opt, decay))
        )

    whole = trainer(tmp_path / "whole")
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    assert losses[-1] < 0.8 * losses[0]
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{STEPS // 2}"))
    inner, other = (run.optimizer.optimizer for run in (whole, resumed))  # accelerate wraps the optimizer
    assert isinstance(inner, Butterfly)
    assert_same_run(whole.model, inner, resumed.model, other)
    assert other.param_groups[0]["lr"] == pytest.approx(1e-2 * decay(STEPS))


def test_lightning_automatic_optimization(tmp_path: Path) -> None:
    """``configure_optimizers`` returns optimizer and schedule; the step gets Lightning's closure."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            inputs, labels = batch
            return nn.functional.cross_entropy(self.network(inputs), labels)

        def configure_optimizers(self) -> dict[str, Any]:
            opt = Butterfly(self.parameters(), lr=0.02)
            return {"optimizer": opt, "lr_scheduler": {"scheduler": LambdaLR(opt, decay), "interval": "step"}}

    def fit(epochs: int, checkpoint: Path | None = None) -> tuple[nn.Module, Any, Any]:
        module = Module()
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, max_epochs=epochs, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, DataLoader(Samples(), batch_size=BATCH), ckpt_path=checkpoint)
        return module.network, trainer.optimizers[0], trainer

    model, opt, trainer = fit(1)
    by_hand = network()
    assert_same_run(model, opt, by_hand, train_by_hand(by_hand))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed, resumed_opt, _ = fit(2, tmp_path / "one.ckpt")
    whole, whole_opt, _ = fit(2)
    assert_same_run(resumed, resumed_opt, whole, whole_opt)


def test_accelerate(tmp_path: Path) -> None:
    """Gradient accumulation over two batches, ``clip_grad_norm_`` and ``save_state``."""
    accelerate = pytest.importorskip("accelerate")

    def parts() -> tuple[Any, ...]:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = network()
        opt = Butterfly(model.parameters(), lr=0.02)
        return accelerator, *accelerator.prepare(model, opt, DataLoader(Samples(), batch_size=BATCH))

    def train(accelerator: Any, model: Any, opt: Any, loader: Any) -> None:
        for inputs, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(inputs), labels))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
                opt.zero_grad()

    first = parts()
    train(*first)
    by_hand = network()
    plain = Butterfly(by_hand.parameters(), lr=0.02)
    for step, (inputs, labels) in enumerate(DataLoader(Samples(), batch_size=BATCH)):
        (nn.functional.cross_entropy(by_hand(inputs), labels) / 2).backward()
        if step % 2:
            nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
            plain.step()
            plain.zero_grad()
    accelerator, model, opt, _ = first
    assert_same_run(accelerator.unwrap_model(model), opt.optimizer, by_hand, plain)
    accelerator.save_state(str(tmp_path / "state"))
    kept = copy.deepcopy(snapshot(opt.optimizer))
    second = parts()
    second[0].load_state(str(tmp_path / "state"))
    assert_same(snapshot(second[2].optimizer), kept)
    train(*first)
    train(*second)
    assert_same_run(second[1], second[2].optimizer, model, opt.optimizer)


@pytest.mark.parametrize("kind", [Butterfly, ButterflyW])
def test_timm_registry(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registered optimizer through ``create_optimizer_v2``: groups without decay for biases, ``foreach=True``."""
    timm_optim = pytest.importorskip("timm.optim")
    registry = pytest.importorskip("timm.optim._optim_factory").default_registry
    monkeypatch.setattr(registry, "_optimizers", dict(registry._optimizers))
    info = timm_optim.OptimInfo(name="butterfly", opt_class=kind, has_betas=True, defaults={"refit_every": 3})
    registry.register(info)

    def train(model: nn.Module, opt: Any) -> None:
        for inputs, labels in DataLoader(Samples(), batch_size=BATCH):
            opt.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            opt.step()

    def create(name: str) -> tuple[nn.Module, Any]:
        model = network()
        keywords = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.9, 0.9), "foreach": True}
        return model, timm_optim.create_optimizer_v2(model, opt=name, **keywords)

    model, opt = create("butterfly")
    assert type(opt) is kind
    assert [group["weight_decay"] for group in opt.param_groups] == [0.0, 0.1]
    train(model, opt)
    by_hand = network()
    biases, weights = ([p for p in by_hand.parameters() if p.ndim == ndim] for ndim in (1, 2))
    groups = [{"params": biases, "weight_decay": 0.0}, {"params": weights, "weight_decay": 0.1}]
    plain = kind(groups, lr=0.02, betas=(0.9, 0.9), refit_every=3)
    train(by_hand, plain)
    assert_same_run(model, opt, by_hand, plain)
    averaged, lookahead = create("lookahead_butterfly")
    train(averaged, lookahead)
    assert all(bool(p.isfinite().all()) for p in averaged.parameters())
    assert not torch.equal(averaged[0].weight, model[0].weight)


def test_skorch(tmp_path: Path) -> None:
    """``NeuralNetClassifier(optimizer=Butterfly)`` with a schedule; its saved parameters go on."""
    skorch = pytest.importorskip("skorch")
    callbacks = pytest.importorskip("skorch.callbacks")
    data = Samples()

    def classifier(epochs: int) -> Any:
        schedule = callbacks.LRScheduler(policy=LambdaLR, step_every="batch", lr_lambda=decay)
        return skorch.NeuralNetClassifier(
            network(), criterion=nn.CrossEntropyLoss, optimizer=Butterfly, optimizer__betas=(0.9, 0.95), lr=0.02,
            batch_size=BATCH, max_epochs=epochs, train_split=None, verbose=0, callbacks=[("schedule", schedule)],
        )  # fmt: skip

    net = classifier(1).fit(data.inputs, data.labels)
    by_hand = network()
    assert_same_run(net.module_, net.optimizer_, by_hand, train_by_hand(by_hand))
    files = {f"f_{part}": str(tmp_path / part) for part in ("params", "optimizer", "history")}
    net.save_params(**files)
    resumed = classifier(1).initialize()
    resumed.load_params(**files)
    for each in (net, resumed):
        each.set_params(callbacks=None)
        each.partial_fit(data.inputs, data.labels)
    assert_same_run(net.module_, net.optimizer_, resumed.module_, resumed.optimizer_)


def test_peft_low_rank_adapters() -> None:
    """Only the adapters have a state and move; those behind a zero wait, bit for bit, for their first gradient."""
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(network(), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"]))
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    assert len(trained) == 4
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    opt = Butterfly(model.parameters(), lr=0.05)
    losses = []
    for step, (inputs, labels) in enumerate(list(DataLoader(Samples(), batch_size=BATCH)) * 3):
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        opt.step()
        losses.append(loss.item())
        if step == 0:  # B is zero at first, and with it the gradient of A
            assert all(torch.equal(param, start[name]) == ("lora_A" in name) for name, param in trained.items())
    assert sum(losses[-STEPS:]) < 0.8 * sum(losses[:STEPS])
    assert set(opt.state) == set(trained.values())
    for name, param in model.named_parameters():
        assert torch.equal(param, start[name]) == (name not in trained)


@pytest.mark.skipif(torch.cuda.is_available(), reason="DeepXDE makes the GPU torch's default device, for all tests")
def test_deepxde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``Model.compile(Butterfly(...))``: its closure, its loss, and a restored model goes on as the first."""
    deepxde = pytest.importorskip("deepxde")
    monkeypatch.chdir(tmp_path)
    data = Samples()
    labels = nn.functional.one_hot(data.labels).float()

    def compiled() -> tuple[Any, Butterfly]:
        net = deepxde.nn.FNN([6, 8, 3], "tanh", "Glorot normal")
        net.load_state_dict(dict(zip(net.state_dict(), network().state_dict().values(), strict=True)))
        arrays = [part[half].numpy() for half in (slice(None), slice(8)) for part in (data.inputs, labels)]
        model = deepxde.Model(deepxde.data.DataSet(*arrays), net)
        opt = Butterfly(net.parameters(), lr=0.02)
        model.compile(opt, loss="MSE", verbose=0)
        return model, opt

    model, opt = compiled()
    model.train(iterations=STEPS, display_every=STEPS, verbose=0)
    by_hand = network()
    plain = Butterfly(by_hand.parameters(), lr=0.02)
    for _ in range(STEPS):
        plain.zero_grad()
        nn.functional.mse_loss(by_hand(data.inputs), labels).backward()
        plain.step()
    assert_same_run(model.net, opt, by_hand, plain)
    path = model.save(str(tmp_path / "model"), verbose=0)
    restored, other = compiled()
    restored.restore(path, verbose=0)
    for each in (model, restored):
        each.train(iterations=STEPS, display_every=STEPS, verbose=0)
    assert_same_run(model.net, opt, restored.net, other)
