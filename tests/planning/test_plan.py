"""What is planned from configurations, against the loaded models, their tensors, PyTorch's counts
and files on disk."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_recipe
from torch.utils.flop_counter import FlopCounterMode

import potstill
from potstill.cli.app import main
from potstill.config import CacheOptions, Lora, Recipe, Sampling, make_recipe
from potstill.kl.fused import MIB, fused_loss
from potstill.kl.head import Head
from potstill.kl.terms import LossTerms
from potstill.models.adapters import attach
from potstill.models.drawing import draw
from potstill.models.flops import model_flops
from potstill.models.language_model import ASSETS, load_model
from potstill.planning.devices import DEVICES, device_of
from potstill.planning.disk import bytes_a_token, disk_of
from potstill.planning.memory import Outlines, cache_bytes, drawing_bytes, memory_of
from potstill.planning.operations import computed_again
from potstill.planning.passes import LiveBytes, pass_bytes, passes_by_rule
from potstill.planning.plan import Circumstances, cells_of, changes_that_help, needs_of, pair_of
from potstill.planning.seconds import traffic_of
from potstill.planning.sizes import (
    Outline,
    from_config,
    model_sizes,
    outline_of,
    planned_student,
    without_weights,
)
from potstill.planning.work import compute_dtype_on, with_field, work_of
from potstill.types import DataError

ROOT = Path(__file__).parents[2]
SHIPPED = ("potstill:base", "potstill:teacher")


def shipped_pair() -> Outlines:
    return pair_of(Recipe())


def outlined(**sizes) -> Outline:
    import transformers

    config = transformers.Qwen3Config(**sizes)
    return outline_of(from_config(config, "outlined"))


@pytest.mark.parametrize("name", SHIPPED)
def test_sizes_are_those_of_the_loaded_model(name):
    loaded = load_model(name)
    assert model_sizes(without_weights(name)) == model_sizes(loaded)
    sizes = model_sizes(loaded)
    assert sizes.num_weights == sum(w.numel() for w in loaded.model.parameters())
    layers = [sum(w.numel() for w in layer.parameters()) for layer in loaded.backbone.layers]
    assert sizes.largest_layer == max(layers)
    assert sizes.outside_layers == sizes.num_weights - sum(layers)


def test_an_adapter_is_what_learns():
    lora = Lora(rank=4)
    loaded = load_model("potstill:base")
    attach(loaded.model, lora, 0)
    planned = planned_student("potstill:base", lora)
    assert planned.sizes == model_sizes(loaded)
    learning = sum(w.nbytes for w in loaded.model.parameters() if w.requires_grad)
    assert planned.sizes.trained_bytes("bfloat16") == learning
    whole = pass_bytes(outline_of(load_model("potstill:base")), (3, 50), "float32", "float32")
    passes = pass_bytes(planned, (3, 50), "float32", "float32")
    assert passes.is_counted and passes.saved < whole.saved


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_passes_take_what_the_loaded_models_tensors_do(name, compute_dtype):
    model = load_model(name).model
    planned = pass_bytes(outline_of(without_weights(name)), (3, 50), "float32", compute_dtype)
    assert planned.is_counted
    weights = {w.untyped_storage().data_ptr() for w in model.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids_BT = torch.zeros(3, 50, dtype=torch.long)
    half = torch.autocast("cpu", torch.bfloat16, enabled=compute_dtype == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), half:
        hidden_BTD = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
    # The result is there beside what the graph keeps.
    result = hidden_BTD.numel() * hidden_BTD.element_size()
    assert planned.saved == pytest.approx(sum(storages.values()) + result, rel=0.02)
    with LiveBytes(model.parameters()) as live:
        hidden_BTD.backward(torch.ones_like(hidden_BTD))
    assert planned.saved <= planned.backward <= planned.saved + live.peak


def test_the_type_of_a_checkpoint_outlives_a_count():
    outline = outlined(vocab_size=40, hidden_size=32, num_hidden_layers=1, dtype="bfloat16")
    recipe = Recipe()
    assert compute_dtype_on(recipe, outline.config, on_cpu=False) == "bfloat16"
    pass_bytes(outline, (1, 8), "float32", "float32")
    assert compute_dtype_on(recipe, outline.config, on_cpu=False) == "bfloat16"
    assert compute_dtype_on(recipe, outline.config, on_cpu=True) == "float32"


def test_an_architecture_that_reads_numbers_is_estimated():
    import transformers

    config = transformers.Qwen3MoeConfig(**MIXTURE)
    outline = outline_of(from_config(config, "mixture"))
    passes = pass_bytes(outline, (2, 16), "float32", "float32")
    assert passes == passes_by_rule(outline, (2, 16), "float32", "float32")
    assert not passes.is_counted


def test_the_cache_of_decoding_is_that_of_the_model():
    model = load_model("potstill:teacher")
    ids_BT = torch.zeros(5, 12, dtype=torch.long)
    cache = model.model(input_ids=ids_BT, use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(model_sizes(model), 5, 12, "float32") == held


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}, {"top_k": 20}, {"top_p": 0.9}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drawing_takes_its_tensors(sampling, dtype):
    torch.manual_seed(0)
    logits_RV = torch.randn(4, 40_000).to(getattr(torch, dtype))
    with LiveBytes([logits_RV]) as live:
        draw(logits_RV, torch.rand(4, dtype=torch.float64), Sampling(**sampling))
    planned = drawing_bytes(Sampling(**sampling), dtype)
    assert 0.75 * planned <= live.peak / logits_RV.numel() <= 1.02 * planned


def test_a_run_writes_what_is_planned(tmp_path):
    recipe = tiny_recipe(tmp_path / "run")
    result = potstill.train(recipe, quiet=True)
    sizes = model_sizes(result.student)
    (checkpoint,) = (tmp_path / "run/checkpoint").iterdir()
    written = [checkpoint / f"{name}.safetensors" for name in ("model", "optimizer")]
    planned = disk_of(recipe, sizes)
    assert sum(f.stat().st_size for f in written) == pytest.approx(planned.checkpoint, rel=0.2)
    weights = (tmp_path / "run/model/model.safetensors").stat().st_size
    assert weights == pytest.approx(planned.student, rel=0.2)


def test_a_cache_takes_what_its_columns_do():
    teacher = model_sizes(without_weights("potstill:teacher"))
    assert bytes_a_token(CacheOptions(), teacher, 64) == 2 + 2 * 96 + 12
    assert bytes_a_token(CacheOptions(dtype="int8"), teacher, 64) == 2 + 96 + 4 + 12
    assert bytes_a_token(CacheOptions(payload="topk"), teacher, 64) == 2 + 64 * 8 + 12
    assert bytes_a_token(CacheOptions(payload="completions"), teacher, 64) == 2


MIXTURE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
    "moe_intermediate_size": 24,
    "num_experts": 6,
    "num_experts_per_tok": 2,
}


def test_of_a_mixture_the_chosen_experts_are_counted():
    import transformers

    config = transformers.Qwen3MoeConfig(**MIXTURE)
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    flops = model_flops(model.model, Head(model.lm_head.weight), config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(11)[None], use_cache=False)
    counted = flops.per_token * 11 + flops.per_pair * 11**2 + 11 * flops.head
    assert counter.get_total_flops() == pytest.approx(counted, rel=0.002)
    sizes = model_sizes(from_config(config, "mixture"))
    assert sizes.read_by(1) == pytest.approx(flops.per_token / 2)
    assert sizes.read_by(10**6) > 2 * sizes.read_by(1)


@pytest.mark.parametrize("memory", [0, 1, 2, 100])
def test_what_the_loss_computes_again_is_counted(memory):
    """All its products, against four that nothing can avoid and those that are planned."""
    num, vocab_size, widths = 600, 3100, (24, 40)
    student, teacher = (outlined(vocab_size=vocab_size, hidden_size=w) for w in widths)
    recipe = make_recipe(
        {
            "train": {"loss_memory": memory, "tokens_per_batch": num, "prompts_per_step": 6},
            "window": {"tokens": 100},
        }
    )
    work = work_of(recipe, 1, 100)
    assert work.loss_tokens == num
    sides = [(torch.randn(num, w), torch.randn(vocab_size, w)) for w in widths]
    hidden_ND, weight_VD = (tensor.requires_grad_() for tensor in sides[0])
    with FlopCounterMode(display=False) as counter:
        given = (hidden_ND, Head(weight_VD), sides[1][0], Head(sides[1][1]))
        fused_loss(*given, LossTerms(reverse=1.0), budget=memory * MIB)
    once = 2 * num * vocab_size * (3 * widths[0] + widths[1])
    again = computed_again(recipe, Outlines(student=student, teacher=teacher), work)
    assert counter.get_total_flops() == pytest.approx(once + again, rel=0.01)
    assert (again > 0) == (memory < 100)


def test_operations_of_a_step_are_those_that_pytorch_counts(tmp_path):
    script = runpy.run_path(str(ROOT / "benchmarks/plan.py"))
    script["CASES"]["embedded"] = script["Case"]("", 20, 6, 128)
    found = script["measured_operations"]("embedded", tmp_path)
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["embedded", "smollm2", "qwen3-50m"])
def test_memory_is_what_a_process_takes(name):
    script = runpy.run_path(str(ROOT / "benchmarks/plan.py"))
    found = script["in_a_process"](name, "freed")
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.15)


def test_layers_that_are_run_again_take_less_memory_and_more_operations():
    pair, once = shipped_pair(), make_recipe({"objective": {"prefix": "student"}})
    again = with_field(once, "train.activation_checkpointing", True)
    asked = Circumstances(device=DEVICES["H200"], prompt_tokens=8)
    saving, usual = (needs_of(recipe, pair, "live", asked) for recipe in (again, once))
    assert saving.memory.peak < usual.memory.peak
    extra = sum(saving.operations.values()) - sum(usual.operations.values())
    assert extra == usual.operations["student_forward"]


def test_traffic_by_hand():
    fields = {"train": {"prompts_per_step": 8}, "objective": {"prefix": "student"}}
    pair, recipe = shipped_pair(), make_recipe(fields)
    sizes = pair.student.sizes
    work = work_of(recipe, 8, 16, 4)
    traffic = traffic_of(recipe, pair, work, "remote", 4)
    assert work.num_rollouts == 2 and work.num_batches == 1
    layers = 2 * sizes.largest_layer
    assert traffic.shards == 0.75 * 4 * (2 * layers + sizes.outside_layers + sizes.num_weights)
    assert traffic.copy == 0.75 * 4 * sizes.num_weights
    assert traffic.states == 2 * 16 * 96 * 4
    assert traffic_of(recipe, pair, work, "live", 1).total == 0
    of_teacher = with_field(recipe, "objective.prefix", "teacher")
    assert traffic_of(of_teacher, pair, work, "live", 4).copy == 0
    with pytest.raises(DataError, match="which 3 devices cannot share evenly"):
        work_of(recipe, 8, 16, 3)


def test_an_engine_has_weights_and_keys_of_its_own(tmp_path, capsys):
    """In place of what this process decodes with; a server that is there is not counted."""
    pair, objective = shipped_pair(), {"prefix": "student"}
    work = work_of(Recipe(), 20, 100, 1)
    engine = {"rollouts": {"engine": "vllm"}, "objective": objective}
    found = {
        name: memory_of(tiny_recipe(tmp_path, **sections), pair, work, "live", on_cpu=True)
        for name, sections in {
            "native": {"objective": objective},
            "vllm": engine,
            "url": engine | {"engine": {"url": "http://127.0.0.1:8"}},
        }.items()
    }
    weights = sum(w.nbytes for w in load_model("potstill:base").model.parameters())
    started = found["vllm"].kept
    assert started["engine's weights"] == weights
    assert started["engine's KV cache"] == found["native"].phases["rollouts"]["KV cache"] > 0
    assert found["vllm"].phases["rollouts"] == {} == found["url"].phases["rollouts"]
    assert found["url"].kept == found["native"].kept
    main(["plan", "demo", "--method", "opd", "--rollouts.engine", "vllm", "--device", "H100-SXM"])
    assert "--gpu-memory-utilization 0.01" in capsys.readouterr().out


def test_shards_are_smaller_and_the_copy_that_decodes_is_whole():
    pair, recipe = shipped_pair(), make_recipe({"train": {"prompts_per_step": 8}})
    one, four = (
        memory_of(recipe, pair, work_of(recipe, 8, 16, n), "live", num_devices=n, on_cpu=True)
        for n in (1, 4)
    )
    assert four.kept["student"] == one.kept["student"] // 4
    assert four.kept["moments"] == one.kept["moments"] // 4
    assert four.kept["decoding copy"] == one.kept["student"]
    assert four.kept["teacher"] == one.kept["teacher"]


def test_changes_are_fields_that_make_it_fit():
    recipe = make_recipe({"window": {"tokens": 64}, "train": {"tokens_per_batch": 8192}})
    pair = shipped_pair()
    small = device_of("RTX-4090").__class__(**{**vars(DEVICES["RTX-4090"]), "memory": 30e6})
    asked = Circumstances(device=small, prompt_tokens=8)
    assert not needs_of(recipe, pair, "live", asked).fits(small)
    changes = changes_that_help(recipe, pair, asked)
    assert changes[0].field == "train.tokens_per_batch" and changes[-1].peak <= 30e6
    assert [c.peak for c in changes] == sorted((c.peak for c in changes), reverse=True)


def test_a_student_that_is_its_own_teacher_is_here():
    recipe = make_recipe({"teacher": {"model": "self"}, "objective": {"prefix": "student"}})
    asked = Circumstances(device=DEVICES["H200"], prompt_tokens=8)
    cells = cells_of(recipe, pair_of(recipe), asked)
    assert [cell.needs.place for cell in cells] == ["live", "live"]


def test_several_teachers_have_no_cache():
    recipe = make_recipe({"teachers": [{"name": "a", "model": "start"}]})
    asked = Circumstances(device=DEVICES["H200"], prompt_tokens=8)
    cells = cells_of(recipe, pair_of(recipe), asked)
    assert [cell.needs.place for cell in cells] == ["live", "remote"] * 2
    assert cells[0].needs.traffic.states == 0
    far = recipe.teachers[0].model_copy(update={"model": "potstill:base", "url": "http://a"})
    there = recipe.model_copy(update={"teachers": (far,)})
    live, remote, *_ = cells_of(there, pair_of(there), asked)
    of_base = live.needs.traffic.states
    # In float32: 64 numbers of the one beside the first, and its own 96 of the first.
    assert of_base > 0 and remote.needs.traffic.states == of_base * (64 + 96) / 64


def test_the_command_reads_configurations_alone(tmp_path, capsys):
    for name in ("base", "teacher"):
        (tmp_path / name).mkdir()
        shutil.copy(ASSETS / name / "config.json", tmp_path / name)
    models = [
        "--student.model",
        str(tmp_path / "base"),
        "--teacher.model",
        str(tmp_path / "teacher"),
    ]
    main(["plan", "demo", *models, "--device", "H200", "--devices", "8", "--json"])
    data = json.loads(capsys.readouterr().out)
    assert data["models"]["teacher"]["num_weights"] == 307_152 and data["fits"]
    assert [cell["teacher"] for cell in data["cells"]] == [
        *("live", "cached", "remote"),
        *("live", "remote"),
    ]
    main(["plan", "demo", "--method", "sft", "--device", "L40S"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 110 and "it fits: " in out


def test_teachers_beside_the_first_are_counted_where_they_are():
    places = {"here": {}, "url": {"url": "http://h:8"}, "memory": {"placement": "offloaded"}}
    tables = [{"name": name, "model": "potstill:teacher", **more} for name, more in places.items()]
    tables.append({"name": "start", "model": "start"})
    common = {"objective": {"prefix": "student"}, "teachers": tables}
    plain = make_recipe(common)
    adapted = make_recipe(common | {"student": {"lora": {"rank": 2}}})
    pair = pair_of(plain)
    kept = memory_of(plain, pair, work_of(plain, 8, 64), "live", on_cpu=True).kept
    teacher, student = pair.further[0].sizes, pair.student.sizes
    assert kept["teacher here"] == 4 * teacher.num_weights
    assert kept["teacher url"] == kept["teacher memory"] == 4 * teacher.head_weights
    assert kept["teacher start"] == 4 * student.num_weights
    # Its base with the adapter off.
    work = work_of(adapted, 8, 64)
    assert "teacher start" not in memory_of(adapted, pair, work, "live", on_cpu=True).kept


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "H10"], "--device is 'H10'; choose one of H100-SXM"),
        (["--devices", "0"], "--devices is 0; give 1 or more"),
        (["--devices", "5"], "which 5 devices cannot share evenly"),
        (["--response-tokens", "500"], "more than window.tokens = 128"),
        (["--student.model", "nowhere"], "model 'nowhere' is no folder here"),
    ],
)
def test_bad_input_is_one_line(arguments, says, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "demo", "--device", "H200", *arguments])
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_on_scaling_is_current(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = runpy.run_path(str(ROOT / "scripts/scaling_tables.py"))
    text = (ROOT / "docs/scaling.md").read_text()
    assert script["rewritten"](text) == text, "run `python scripts/scaling_tables.py`"
