"""Quantised teachers: checkpoints that transformers has written with torchao and bitsandbytes, read
as any other model, and what is refused of them."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import make_rollout, tiny_recipe
from quantised import KINDS, without_their_warnings, write_quantised, write_whole
from safetensors.torch import load_file, save_file

import potstill
from potstill.config import Objective, TeacherSpec, make_recipe
from potstill.kl.definition import token_divergence
from potstill.models.distributed import World
from potstill.models.language_model import fingerprint, load_model, load_tokenizer
from potstill.models.lean.quantized import bits_a_weight, describe_quantized, type_to_load
from potstill.models.probe import ready
from potstill.objectives.loss import Loss, batch_loss, teacher_signal
from potstill.planning.plan import pair_of
from potstill.rollouts.batching import make_batch
from potstill.runs import run_folder
from potstill.teachers.load import load_teacher
from potstill.teachers.manifest import identify, identify_folder
from potstill.types import ModelError

STUDENT = "potstill:stops-student"
BATCH = make_batch([make_rollout([1, 5, 6], [9, 5, 2]), make_rollout([1], [3] * 7)])
SETTINGS = {
    "int8": {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnly"}}},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False},
    "llm-int8": {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True},
    "gptq": {"quant_method": "gptq", "bits": 3},
    "unknown": {"quant_method": "new"},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "whole"
    write_whole(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def quantised(request, whole):
    """A quantised checkpoint: its kind and its folder."""
    return request.param, write_quantised(whole, request.param)


@pytest.mark.real
def test_its_signal_is_that_of_its_own_logits(quantised, whole):
    """Whose weights are not those of the whole model."""
    kind, folder = quantised
    student = load_model(STUDENT)
    with without_their_warnings(), torch.no_grad():
        teacher = ready(str(folder)).eval().requires_grad_(False)
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        if kind == "nf4":
            # Of itself it would compute in bfloat16 on some CPUs.
            plain = plain.dequantize()
        logits_NV = plain(BATCH.teacher_ids_BT).logits[BATCH.teacher_mask_BT].float()
        other_NV = ready(str(whole))(BATCH.teacher_ids_BT)[BATCH.teacher_mask_BT]
        student_NV = student.head(student(BATCH.input_ids_BT)[BATCH.loss_mask_BT])
        for kl in ("forward", "reverse"):
            loss = Loss(objective=Objective(prefix="student", kl=kl), normalize="token")
            signal = teacher_signal(teacher, BATCH, loss)
            _, loss_N, _ = batch_loss(student, teacher, signal, BATCH, loss)
            logs = (student_NV.log_softmax(-1), logits_NV.log_softmax(-1))
            value_N = token_divergence(*logs, kl)[0]
            torch.testing.assert_close(loss_N, value_N, rtol=1e-5, atol=1e-6)
    assert 0 < (signal - other_NV).abs().max() < 0.5
    assert kind in KINDS and signal.dtype == torch.float32


@pytest.mark.real
def test_a_run_learns_from_it_and_says_so(quantised, tmp_path, capsys):
    kind, folder = quantised
    method, bits = KINDS[kind]
    recipe = {"objective": {"prefix": "student"}, "student": {"model": STUDENT}}
    recipe |= {"teacher": {"model": str(folder), "dtype": "bfloat16"}, "train": {"steps": 1}}
    with without_their_warnings():
        potstill.train(tiny_recipe(tmp_path / "run", **recipe))
    said = capsys.readouterr().err
    assert f"the teacher's weights are quantised ({method}, {bits} bits)" in said
    assert "in float32, as in its files, and teacher.dtype is not read" in said
    told = run_folder.read_json(tmp_path / "run/environment.json")["models"]["teacher"]
    with without_their_warnings():
        model = load_model(str(folder))
    assert told["weights"] == fingerprint(model)


@pytest.mark.real
def test_its_identity_is_that_of_its_codes_and_scales(quantised, tmp_path):
    _, folder = quantised
    with without_their_warnings():
        model = load_model(str(folder))
        first, ours = fingerprint(model), identify(model)
        assert fingerprint(load_model(str(folder), dtype="bfloat16")) == first
        assert ours.dtype == identify_folder(TeacherSpec(model=str(folder))).dtype == "float32"
        changed = shutil.copytree(folder, tmp_path / "changed")
        tensors = load_file(changed / "model.safetensors")
        name = next(n for n, t in tensors.items() if t.dtype in (torch.int8, torch.uint8))
        tensors[name].view(-1)[0] ^= 1
        save_file(tensors, changed / "model.safetensors", metadata=metadata_of(folder))
        assert fingerprint(load_model(str(changed))) != first


def metadata_of(folder):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return file.metadata()


@pytest.mark.real
def test_the_plan_counts_its_bits_and_all_its_operations(quantised, whole):
    kind, folder = quantised
    sizes = {
        name: pair_of(make_recipe({"teacher": {"model": str(path)}})).teacher.sizes
        for name, path in (("whole", whole), ("quantised", folder))
    }
    in_layers = 2 * (64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 128)
    saved = in_layers * (32 - KINDS[kind][1]) // 8
    assert sizes["whole"].weight_bytes("float32") - saved == sizes["quantised"].weight_bytes(
        "float32"
    )
    with without_their_warnings():
        model = load_model(str(folder))
    assert model.flops.per_token == sizes["whole"].flops.per_token
    assert model.num_weights == sizes["whole"].num_weights


@pytest.mark.real
def test_a_quantised_head_is_refused(whole, tmp_path):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    settings = transformers.TorchAoConfig(
        Int8WeightOnlyConfig(), include_input_output_embeddings=True
    )
    with without_their_warnings():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            whole, dtype=torch.float32, quantization_config=settings
        )
        with pytest.raises(ModelError, match=r"its head is quantised .* without lm_head"):
            ready(model, load_tokenizer(str(whole)))


@pytest.mark.real
def test_a_quantised_student_is_refused(quantised, tmp_path):
    recipe = tiny_recipe(tmp_path / "run", student={"model": str(quantised[1])})
    with (
        without_their_warnings(),
        pytest.raises(ModelError, match=r"codes that cannot learn; set student\.lora\.rank"),
    ):
        potstill.train(recipe, quiet=True)


def says(settings):
    return SimpleNamespace(quantization_config=settings, dtype=torch.float16)


def test_how_wide_a_weight_is():
    found = {kind: bits_a_weight(says(settings)) for kind, settings in SETTINGS.items()}
    assert found == {"int8": 8, "nf4": 4, "llm-int8": 8, "gptq": 3, "unknown": None}
    assert bits_a_weight(SimpleNamespace()) is None
    assert describe_quantized(says(SETTINGS["unknown"])) == "new"
    assert type_to_load(says(SETTINGS["gptq"]), "float32") == torch.float16
    assert type_to_load(SimpleNamespace(), "bfloat16") == torch.bfloat16


@pytest.mark.parametrize("placement", ["sharded", "offloaded"])
def test_a_quantised_teacher_is_not_taken_apart(whole, tmp_path, placement):
    folder = shutil.copytree(whole, tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": SETTINGS["nf4"]})
    )
    teacher = {"model": str(folder), "placement": placement}
    recipe = make_recipe({"teacher": teacher, "objective": {"prefix": "student"}})
    message = f'is quantised .bitsandbytes, 4 bits. and teacher.placement is "{placement}"'
    with pytest.raises(ModelError, match=message):
        load_teacher(recipe, load_model(STUDENT), None, World(0, 2, torch.device("cpu")))


def test_a_teacher_that_is_given_is_not_looked_up_by_its_name():
    given = load_model("potstill:stops-teacher")
    teacher = {"model": "nobody/nothing", "placement": "sharded"}
    recipe = make_recipe({"teacher": teacher, "objective": {"prefix": "student"}})
    world = World(0, 1, torch.device("cpu"))
    found = load_teacher(recipe, load_model(STUDENT), None, world, given.model, given.tokenizer)
    assert found is not None and found.can_score


def test_a_quantised_student_has_no_moving_average():
    student = load_model(STUDENT)
    student.model.hf_quantizer = object()
    teacher = {"model": "self", "ema": 0.9}
    recipe = make_recipe({"teacher": teacher, "objective": {"prefix": "student"}})
    with pytest.raises(ModelError, match=r"no average in float32; set teacher\.refresh_steps"):
        load_teacher(recipe, student, None, World(0, 1, torch.device("cpu")))
