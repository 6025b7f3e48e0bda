"""The examples of docs/qat.md run, on a small Brevitas model."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).parents[2] / "docs" / "qat.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)

pytestmark = pytest.mark.skipif(not find_spec("brevitas"), reason="needs Brevitas")


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the examples take for given."""
    from cora_plugin.integrations.brevitas.recipe import quantize_ptq
    from cora_plugin.testing import Net, images, trained

    monkeypatch.chdir(tmp_path)
    net = trained(Net())
    x = images(64, seed=2)
    loader = [(part, part.mean((1, 2, 3)).gt(0).long()) for part in x.split(16)]
    model = quantize_ptq(net, loader, weight_bits=3, act_bits=4)
    return {"model": model, "net": net, "loader": loader, "held_out": loader[:2]}


def test_finetune(names, tmp_path):
    exec(BLOCKS[0], names)
    assert len(names["report"].transitions.steps) == 12
    assert {path.name for path in tmp_path.iterdir()} == {"qat.json", "qat.png"}


def test_a_loop_of_ones_own(names):
    exec(BLOCKS[1], names)
    assert names["scheduler"].last_epoch == 4
    assert names["scheduler"].last.target > 0


@pytest.mark.skipif(not find_spec("lightning"), reason="needs lightning")
def test_lightning_callback(names, tmp_path):
    import lightning

    from cora_plugin.qat import TransitionRateScheduler, param_groups

    exec(BLOCKS[2], {"TransitionRateScheduler": TransitionRateScheduler}, names)

    class Module(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, batch, number):
            x, labels = batch
            return torch.nn.functional.cross_entropy(self.model(x), labels)

        def configure_optimizers(self):
            return torch.optim.AdamW(param_groups(self.model), 1e-3)

    loader = torch.utils.data.DataLoader(names["loader"], batch_size=None)

    def fit(epochs, checkpoint=None):
        callback = names["TransitionRates"](0.02, steps=4)
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accumulate_grad_batches=2,
            callbacks=[callback],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Module(names["model"]), loader, ckpt_path=checkpoint)
        return trainer, callback.scheduler.transitions()

    trainer, found = fit(1)
    assert len(found.steps) == 2
    assert found.skipped == 2
    assert found.steps[-1].running > 0
    trainer.save_checkpoint(tmp_path / "lightning.ckpt")
    _, resumed = fit(2, tmp_path / "lightning.ckpt")
    assert resumed.steps[:2] == found.steps
    assert len(resumed.steps) == 4
