"""Names and patterns of modules: each must match something it can apply to."""

import pytest

from lora_engine.errors import UserError
from lora_engine.models.peft.module_names import check_modules
from lora_engine.testing import tiny_llama

LAYER = "model.layers.0"


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def check(model, target="all-linear", exclude=None, save=None):
    return check_modules(
        model,
        target_modules=target,
        exclude_modules=exclude,
        modules_to_save=save,
        key=lambda field: f"lora.{field}",
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"target": ["q_proj", "v_porj"]},
            "lora.target_modules: 'v_porj' matches no module of the model; did you mean v_proj?",
        ),
        (
            {"target": ["xyz"]},
            "lora.target_modules: 'xyz' matches no module of the model; it has embed_tokens, "
            "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj and 1 more",
        ),
        (
            {"target": [f"{LAYER}.self_attn.q_porj"]},
            f"lora.target_modules: '{LAYER}.self_attn.q_porj' matches no module of the model; "
            f"did you mean {LAYER}.self_attn.q_proj?",
        ),
        (
            {"target": "all_linear"},
            "lora.target_modules: 'all_linear' matches no module of the model; did you mean "
            "all-linear?",
        ),
        (
            {"target": "q_proj"},
            "lora.target_modules: 'q_proj' matches no module of the model; did you mean the name "
            "[q_proj], in brackets?",
        ),
        (
            {"target": "q_proj, v_proj"},
            "lora.target_modules: 'q_proj, v_proj' matches no module of the model; did you mean "
            "the list [q_proj, v_proj]?",
        ),
        (
            {"target": r".*\.query"},
            r"lora.target_modules: '.*\\.query' matches no module of the model; a text is a "
            r"regular expression for a module's whole name, such as .*\.q_proj",
        ),
        (
            {"target": "(q_proj"},
            "lora.target_modules: '(q_proj' is not a regular expression: missing ), unterminated "
            "subpattern at position 0; for a list of names, write [q_proj, v_proj]",
        ),
        (
            {"target": ".*mlp.*"},
            f"lora.target_modules: '.*mlp.*' matches {LAYER}.mlp, a LlamaMLP, which takes no "
            "adapter; name what is in it: gate_proj, up_proj, down_proj",
        ),
        (
            {"target": ["norm"]},
            "lora.target_modules: 'norm' matches model.norm, a LlamaRMSNorm, which takes no "
            "adapter; leave it out",
        ),
        (
            {"exclude": ["k_prj"]},
            "lora.exclude_modules: 'k_prj' matches no module of the model; did you mean k_proj?",
        ),
        (
            {"exclude": "*"},
            "lora.exclude_modules: '*' is not a regular expression: nothing to repeat at position "
            "0; for a list of names, write [q_proj, v_proj]",
        ),
        (
            {"exclude": ".*_proj"},
            "lora.target_modules: 'all-linear' is left out by lora.exclude_modules; name it in "
            "one of them",
        ),
        (
            {"target": ["q_proj", "k_proj"], "exclude": ["k_proj"]},
            "lora.target_modules: 'k_proj' is left out by lora.exclude_modules; name it in one of "
            "them",
        ),
        (
            {"target": ["q_proj", "lm_head"], "save": ["lm_head"]},
            "lora.target_modules: 'lm_head' is trained in full by lora.modules_to_save; name it "
            "in one of them",
        ),
        (
            {"save": ["lm_heads"]},
            "lora.modules_to_save: 'lm_heads' matches no module of the model; did you mean "
            "lm_head?",
        ),
        (
            {"save": ["head"]},  # PEFT takes the end of a name without a dot, but only here
            "lora.modules_to_save: 'head' matches no module of the model; did you mean lm_head?",
        ),
        (
            {"save": ["layers"]},
            "lora.modules_to_save: 'layers' is model.layers, a ModuleList, which cannot be trained "
            "as one; leave it out",
        ),
        (
            {"save": ["rotary_emb"]},
            "lora.modules_to_save: 'rotary_emb' is model.rotary_emb, a LlamaRotaryEmbedding, which "
            "has no weights to train; leave it out",
        ),
        (
            {"save": ["mlp", "gate_proj"]},
            "lora.modules_to_save: 'gate_proj' is inside 'mlp', which is trained in full already; "
            "leave one out",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_matches_nothing_is_one_line(model, given, message):
    with pytest.raises(UserError) as caught:
        check(model, **given)
    assert str(caught.value) == message


def test_a_long_name_is_cut(model):
    with pytest.raises(UserError) as caught:
        check(model, target=["x" * 5000])
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 14),
        ({"target": "All-Linear"}, 14),
        ({"target": ["q_proj", f"{LAYER}.self_attn.v_proj"]}, 3),
        ({"target": r".*\.(q|v)_proj"}, 4),
        ({"target": ["embed_tokens", "lm_head"]}, 2),
        ({"exclude": ["k_proj", "lm_head"]}, 12),
        ({"exclude": r".*\.0\..*"}, 7),
        ({"save": ["lm_head", "norm", "mlp"]}, 8),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_gets_an_adapter(model, given, expected):
    assert len(check(model, **given)) == expected
