"""vLLM's own models: each that builds routed experts is in the table of families, or there is a reason why not."""

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from transformers.models.auto import modeling_auto

from offline.source.architectures import FAMILIES
from offline.source.unsupported import REASONS

VLLM = Path(find_spec("vllm").submodule_search_locations[0])
FOLDERS = ("model_executor/models", "models")
FACTORY = "FusedMoEFactory"
# What generates text, out of vLLM's lists; the others embed, score or draft.
LISTS = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS")
# Of architectures that transformers does not have.
TYPES = {
    "BailingMoeForCausalLM": "bailing_moe",
    "BailingMoeV2ForCausalLM": "bailing_moe_v2",
    "BailingMoeV2_5ForCausalLM": "bailing_hybrid",
    "BailingMoeV3ForCausalLM": "bailing_hybrid",
    "DeepseekForCausalLM": "deepseek",
    "DeepseekV41ForCausalLM": "deepseek_v41",
    "Dots3NoteForCausalLM": "dots3_note",
    "ExaoneMoEForCausalLM": "exaone_moe",
    "KimiK3ForConditionalGeneration": "kimi_k3",
    "LongcatFlashNgramForCausalLM": "longcat_flash",
    "MiMoV2ForCausalLM": "mimo_v2",
    "MiniMaxM3SparseForCausalLM": "minimax_m3_text",
    "NemotronHPuzzleForCausalLM": "nemotron_h",
    "NemotronH_Nano_Omni_Reasoning_V3": "NemotronH_Nano_Omni_Reasoning_V3",
    "NemotronH_Nano_VL_V2": "nemotron_h_omni",
    "NemotronH_Super_Omni_Reasoning_V3": "nemotron_h_omni",
    "PhiMoEForCausalLM": "phimoe",
    "SarvamMLAForCausalLM": "sarvam_mla",
    "SarvamMoEForCausalLM": "sarvam_moe",
    "Step3TextForCausalLM": "step3_text",
    "Step3p5ForCausalLM": "step3p5",
}
_BY_NAMES = "not in the table: its experts are found by their names, which are those of qwen2_moe"
_WRAPPED = "builds another model of vLLM's by the config inside its own; not tried"
# Why an architecture needs neither a row nor a message of its own.
UNLISTED = {
    "BailingMoeV3VLForConditionalGeneration": _WRAPPED,
    "Cosmos3EdgeForConditionalGeneration": "dense: the code is shared with a model that is not",
    "Gemma4UnifiedForConditionalGeneration": "its only published sizes are dense",
    "Glm5NextForCausalLM": _BY_NAMES,
    "Glm5NextForConditionalGeneration": _BY_NAMES,
    "HYV4ForCausalLM": _BY_NAMES,
    "InternS1ProForConditionalGeneration": _BY_NAMES,
    "InternS2MobiusForConditionalGeneration": _BY_NAMES,
    "InternS2PreviewForConditionalGeneration": _WRAPPED,
    "K2HorizonForCausalLM": _BY_NAMES,
    "MiMoV2OmniForCausalLM": _WRAPPED,
    "MiniCPMV4_6ForConditionalGeneration": _WRAPPED,
    "MiniCPMV4_7ForConditionalGeneration": _WRAPPED,
    "MistralLarge3ForCausalLM": "reads Mistral's consolidated files, which are refused by name",
    "PanguEmbeddedForCausalLM": "dense: the code is shared with a model that is not",
    "PanguProMoEV2ForCausalLM": _BY_NAMES,
    "PanguUltraMoEForCausalLM": _BY_NAMES,
    "Param2MoEForCausalLM": _BY_NAMES,
    "Qwen3_5ForCausalLM": "dense: the code is shared with a model that is not",
    "Qwen3_5ForConditionalGeneration": "dense: the code is shared with a model that is not",
    "Qwen4ExpForCausalLM": _BY_NAMES,
    "Qwen4ExpForConditionalGeneration": _BY_NAMES,
}


def modules():
    """The syntax trees of the modules with vLLM's models, by name."""
    for folder in FOLDERS:
        for path in sorted((VLLM / folder).rglob("*.py")):
            name = ".".join(("vllm", *path.relative_to(VLLM).with_suffix("").parts))
            yield name.removesuffix(".__init__"), path.name == "__init__.py", ast.parse(path.read_text())


def imported(module, is_package, node):
    """The module that a statement imports from."""
    if not node.level:
        return node.module
    parts = module.split(".") if is_package else module.split(".")[:-1]
    parts = parts[: len(parts) - node.level + 1]
    return ".".join([*parts, node.module] if node.module else parts)


class Models:
    """Which names of vLLM's modules lead to the factory of routed experts: by what each definition mentions."""

    def __init__(self):
        self.mentions, self.origins = {}, {}
        for module, is_package, tree in modules():
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom):
                    source = imported(module, is_package, node)
                    self.origins |= {(module, a.asname or a.name): (source, a.name) for a in node.names}
            for node in tree.body:
                names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
                if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                    self.mentions[module, node.name] = names
                elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                        if isinstance(target, ast.Name):
                            self.mentions[module, target.id] = names - {target.id}

    def resolve(self, module, name):
        place = module, name
        for _ in range(9):
            if place in self.mentions or place not in self.origins:
                break
            place = self.origins[place]
        return place

    def building(self):
        """The definitions that build routed experts, or mention one that does."""
        edges = {place: {self.resolve(place[0], name) for name in names} for place, names in self.mentions.items()}
        found, more = set(), True
        while more:
            more = {p for p, to in edges.items() if p not in found and any(t[1] == FACTORY or t in found for t in to)}
            found |= more
        return found


def registered():
    """Architectures that generate text: where vLLM has them."""
    tree = ast.parse((VLLM / "model_executor/models/registry.py").read_text())
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id in LISTS:
            for architecture, place in ast.literal_eval(node.value).items():
                module, name = place
                yield architecture, module if "." in module else f"vllm.model_executor.models.{module}", name


def types_of_transformers():
    """Types of model by architecture."""
    found = {}
    for mapping in (name for name in dir(modeling_auto) if name.endswith("_MAPPING_NAMES")):
        for model_type, names in getattr(modeling_auto, mapping).items():
            for name in [names] if isinstance(names, str) else names:
                found.setdefault(name, set()).add(model_type)
    return found


@cache
def architectures():
    models = Models()
    building = models.building()
    return {name for name, module, cls in registered() if models.resolve(module, cls) in building}


def test_every_model_with_routed_experts_has_a_row_or_a_reason():
    types, found = types_of_transformers(), architectures()
    assert {"Qwen2MoeForCausalLM", "JambaForCausalLM", "Gemma4ForConditionalGeneration"} <= found, "the walk finds them"
    assert not {"LlamaForCausalLM", "Qwen2ForCausalLM"} & found
    known = {*FAMILIES, *REASONS}
    unknown = {
        name: sorted(own)
        for name in sorted(found - set(UNLISTED))
        if not (own := {TYPES[name]} if name in TYPES else types.get(name, set())) or not own <= known
    }
    assert not unknown, "add a row to FAMILIES, or a reason to offline/source/unsupported.py"


def test_no_reason_is_given_for_what_is_not_there():
    found = architectures()
    assert set(UNLISTED) <= found
    assert set(TYPES) <= found
    assert not set(REASONS) & set(FAMILIES)
