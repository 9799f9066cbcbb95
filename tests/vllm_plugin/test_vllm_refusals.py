"""What cannot be served is refused when it is loaded, by name; engines without adapters stay as they are."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm", reason="needs vLLM: bash tests/run.sh vllm makes an environment with it")

from serving import Request, answers, prompts, save_adapter, save_model
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams

from peft_reft.integrations.vllm import add_adapter


class TestRefusals:
    """What cannot be served is refused when it is loaded, by name."""

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"target_modules": ["q_proj"]}, "no module 'self_attn.q_proj': it fuses modules"),
            ({"target_modules": ["self_attn"]}, "'self_attn' in LlamaDecoderLayer is a LlamaAttention"),
            ({"target_modules": ["gate_proj"]}, "size 128 at 0.mlp.gate_proj.output"),
            ({"target_modules": ["input_layernorm"]}, "is a RMSNorm, whose output cannot be edited"),
            ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
            ({"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
            ({"target_modules": ["embed_tokens"]}, "belongs to no intervention in a numbered layer"),
        ],
    )
    def test_an_adapter_that_vllm_cannot_serve(self, start, model, tmp_path, settings, message):
        folder = save_adapter(tmp_path / "adapter", model, **{"r": 2, "positions": "all"} | settings)
        with pytest.raises(ValueError, match=message):
            start({"it": folder})

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ({"hidden_size": 32}, "'it' edits representations of size 32 .* hidden size 64. It was trained on"),
            ({"num_hidden_layers": 6}, "'it' edits layer 4, but the served model has 4 layers. It was trained on"),
        ],
    )
    def test_an_adapter_of_another_model(self, start, tmp_path, sizes, message):
        other = save_model(tmp_path / "model", **sizes)
        folder = save_adapter(tmp_path / "adapter", other, r=2, positions="all")
        with pytest.raises(ValueError, match=message):
            start({"it": folder})

    def test_an_adapter_of_a_model_of_the_same_sizes_and_another_name_is_served_with_a_warning(
        self, start, tmp_path, folders, log
    ):
        other = save_model(tmp_path / "another")
        folder = save_adapter(tmp_path / "adapter", other, r=2, positions="all")
        engine = start({"all": folders["all"]})
        assert not any("was trained on" in line for line in log)
        add_adapter(engine, "it", str(folder))
        assert len([line for line in log if re.search(r"'it' was trained on .*another', but .* is served", line)]) == 1

    @pytest.mark.parametrize("damage", ["cut", "a parameter less", "no config"])
    def test_a_broken_folder(self, start, folders, tmp_path, damage):
        shutil.copytree(folders["all"], tmp_path / "it")
        weights = tmp_path / "it" / "adapter_model.safetensors"
        if damage == "cut":
            weights.write_bytes(weights.read_bytes()[:-100])
            message = "'.*it' cannot be read: SafetensorError"
        elif damage == "no config":
            (tmp_path / "it" / "adapter_config.json").unlink()
            message = "'.*it' cannot be read: ValueError"
        else:
            tensors = load_file(weights)
            del tensors[next(name for name in tensors if name.endswith("bias"))]
            save_file(tensors, weights)
            message = r"(?s)'it' is broken at 0\.block\.output: .*Missing key.*bias"
        with pytest.raises(ValueError, match=message):
            start({"it": tmp_path / "it"})

    def test_a_module_that_the_model_does_not_call(self, start, folders, monkeypatch):
        from vllm.model_executor.models.llama import LlamaMLP

        def fused(self, x):
            return self.down_proj.quant_method.apply(self.down_proj, self.act_fn(self.gate_up_proj(x)[0]))

        monkeypatch.setattr(LlamaMLP, "forward", fused)
        message = r"'mlp' edits the output of 'mlp.down_proj', which vLLM's model does not call \(\d\.mlp.* 1 others\)"
        with pytest.raises(ValueError, match=message):
            start({name: folders[name] for name in ("all", "mlp")})
        engine = start(
            {"all": folders["all"]}, additional_config={"reft_components": ["mlp_output", "attention_output"]}
        )
        with pytest.raises(ValueError, match=message):
            add_adapter(engine, "mlp", str(folders["mlp"]))
        add_adapter(engine, "attention", str(folders["attention"]))

    def test_a_model_whose_layers_return_something_else(self, start, monkeypatch):
        from vllm.model_executor.models.llama import LlamaDecoderLayer

        original = LlamaDecoderLayer.forward
        monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda self, *a, **k: [*original(self, *a, **k)])
        with pytest.raises(NotImplementedError, match=r"vLLM's LlamaDecoderLayer has .* is edited"):
            start({})

    def test_beam_search_with_an_adapter(self, start):
        engine = start({})
        params = BeamSearchParams(beam_width=2, max_tokens=2)
        assert len(engine.beam_search([{"prompt_token_ids": [7, 8]}], params)[0].sequences) == 2
        params.extra_args = {"reft": "all"}
        with pytest.raises(VLLMValidationError, match="reft='all': vLLM's beam search is many requests"):
            engine.beam_search([{"prompt_token_ids": [7, 8]}], params)

    def test_an_engine_that_the_plug_in_does_not_know(self, start):
        with pytest.raises(ValueError, match="not supported with runner='pooling'"):
            start(runner="pooling")

    def test_a_misspelled_option(self, start):
        with pytest.raises(ValueError, match="Unknown 'reft_adapter' in additional_config"):
            start(None, additional_config={"reft_adapter": {}})

    def test_a_vllm_that_is_built_differently(self, start, monkeypatch):
        from vllm.v1.engine.input_processor import InputProcessor

        from peft_reft.integrations.vllm import plugin, wrapping

        monkeypatch.setattr(plugin, "_done", {"register"})
        monkeypatch.delattr(InputProcessor, "process_inputs")
        with pytest.raises(wrapping.UnknownVersion, match=r"process_inputs is missing.*It knows vLLM 0.32.0"):
            start()
        monkeypatch.setattr(InputProcessor, "process_inputs", lambda self, inputs: None, raising=False)
        with pytest.raises(wrapping.UnknownVersion, match=r"process_inputs takes \['self', 'inputs'\], without"):
            start()


class TestWithoutAdapters:
    def test_an_engine_without_adapters_is_as_without_the_plug_in(self, start):
        requests = [Request(ids) for ids in prompts(8)]
        engine = start(None)
        worker = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in worker.get_model().modules())
        plain = answers(engine, requests)
        with pytest.raises(VLLMValidationError, match="this engine serves no ReFT adapters"):
            answers(engine, [Request((7, 8), "all")])
        # Tokens that no adapter edits stay as they are, to the last bit.
        assert answers(start(), requests) == plain

    def test_importing_the_package_imports_nothing_of_vllm(self):
        code = "import sys, peft_reft; sys.exit(any(name.split('.')[0] == 'vllm' for name in sys.modules))"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
