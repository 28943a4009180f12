"""The speed of llama.cpp on a processor, with the layers of a generated Qwen2-MoE checkpoint.

    python -m benchmarks.llama_cpp MODEL OUT.gguf --type Q3_K_M     write a GGUF file
    python -m benchmarks.llama_cpp OUT.gguf --threads 2             measure it

MODEL comes from ``python -m benchmarks.generate qwen1.5-moe-a2.7b MODEL``. The first command writes all matrices to a
file next to OUT.gguf, tensor by tensor, which llama.cpp then quantizes and which is deleted at the end; with
``--intermediate Q8_0`` it takes about half the disk of MODEL. llama.cpp chooses the type of each matrix: where rows are
no multiple of 256, as in the down projections of Qwen1.5-MoE's experts (1408), it takes a type of more bits.

The second command feeds token ids drawn at random and no tokenizer: a prompt, then one token after another for one
client, then for several clients in one batch, each after the same prompt. Nothing about quality can be learned. A line
of JSON is printed and appended to ``benchmarks/results/llama_cpp.jsonl``.

llama.cpp is compiled for the processor that it is installed on, in an environment of its own that needs no torch:

    python -m venv LLAMA
    LLAMA/bin/pip install llama-cpp-python gguf numpy
    LLAMA/bin/python -m benchmarks.llama_cpp ...
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import re
import resource
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from alphaq_vllm.cores import available_cores
from benchmarks.machine import commit, processor

if TYPE_CHECKING:
    import numpy as np

RESULTS = Path(__file__).parent / "results" / "llama_cpp.jsonl"
TYPES = ("Q3_K_M", "Q4_K_M")
# Of a checkpoint's names: a layer's number is {0}, and a matrix of all experts is one tensor in a GGUF file.
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}


def sources(names: Iterable[str]) -> dict[str, list[str]]:
    """The checkpoint's tensors that each tensor of the GGUF file is made of: one, or that of each expert in order.

    Raises KeyError for a name that has no place in a GGUF file.

    >>> sources(["model.layers.3.mlp.experts.1.up_proj.weight", "model.layers.3.mlp.experts.0.up_proj.weight"])
    {'blk.3.ffn_up_exps.weight': ['model.layers.3.mlp.experts.0.up_proj.weight', \
'model.layers.3.mlp.experts.1.up_proj.weight']}
    """
    found: dict[str, dict[int, str]] = {}
    for name in names:
        module, _, kind = name.rpartition(".")
        layer = re.match(r"model\.layers\.(\d+)\.", module)
        expert = re.search(r"\.experts\.(\d+)\.", module)
        module = re.sub(r"\.experts\.\d+\.", ".experts.", module[layer.end() :] if layer else module)
        target = f"{f'blk.{layer[1]}.' if layer else ''}{NAMES[module]}.{kind}"
        found.setdefault(target, {})[int(expert[1]) if expert else 0] = name
    return {target: [parts[i] for i in sorted(parts)] for target, parts in found.items()}


def read(model: Path) -> dict[str, np.ndarray]:
    """The tensors of a bfloat16 checkpoint as the bits of their values, mapped and not loaded."""
    import numpy as np

    tensors = {}
    for shard in sorted(model.glob("*.safetensors")):
        data = np.memmap(shard, mode="r")
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] != "BF16":
                raise ValueError(f"{shard}: {name}: expected BF16, got {entry['dtype']}")
            first, last = (start + offset for offset in entry["data_offsets"])
            tensors[name] = data[first:last].view(np.uint16).reshape(entry["shape"])
    return tensors


def write(model: Path, out: Path, matrices: str = "BF16") -> None:
    """Write the checkpoint as a GGUF file without a vocabulary; its matrices are of type ``matrices``."""
    import gguf
    import numpy as np

    config = json.loads((model / "config.json").read_text())
    if config["model_type"] != "qwen2_moe":
        raise ValueError(f"{model}: expected a model of type qwen2_moe, got {config['model_type']}")
    writer = gguf.GGUFWriter(out, "qwen2moe")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")

    tensors = read(model)
    names = sources(tensors)

    def encode(bits: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
        if kind == gguf.GGMLQuantizationType.BF16:
            return bits.view(np.uint8)
        values = (bits.astype(np.uint32) << 16).view(np.float32)
        return values if kind == gguf.GGMLQuantizationType.F32 else gguf.quants.quantize(values, kind)

    # llama.cpp computes with vectors and routers in float32.
    kinds = {
        target: gguf.GGMLQuantizationType["F32" if tensors[parts[0]].ndim == 1 or "_inp" in target else matrices]
        for target, parts in names.items()
    }
    for target, parts in names.items():
        shape = tensors[parts[0]].shape
        block, nbytes = gguf.GGML_QUANT_SIZES[kinds[target]]
        if "_exps" in target:
            shape = (len(parts), *shape)
        size = int(np.prod(shape)) // block * nbytes
        writer.add_tensor_info(target, shape, np.dtype(np.float32), size, raw_dtype=kinds[target])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for target, parts in names.items():
        writer.write_tensor_data(np.concatenate([encode(tensors[part], kinds[target]) for part in parts]))
    writer.close()


def quantize(source: Path, out: Path, kind: str, threads: int) -> None:
    """Let llama.cpp quantize a GGUF file."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.allow_requantize = True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp could not quantize {source}")


def sizes(path: Path) -> dict[str, Any]:
    """Bytes of a GGUF file and of its experts, bits a weight of the experts, and the types of the experts' matrices."""
    import gguf

    experts = [tensor for tensor in gguf.GGUFReader(path).tensors if "_exps." in tensor.name]
    weights: dict[str, int] = {}
    for tensor in experts:
        weights[tensor.tensor_type.name] = weights.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    stored = sum(int(tensor.n_bytes) for tensor in experts)
    return {
        "file_bytes": path.stat().st_size,
        "expert_bytes": stored,
        "expert_bits": round(8 * stored / sum(weights.values()), 3),
        "expert_types": {kind: round(n / sum(weights.values()), 3) for kind, n in sorted(weights.items())},
    }


@contextmanager
def _context(model: Any, clients: int, length: int, batch: int, threads: int) -> Iterator[Any]:
    """A context of llama.cpp in which each client has its own cache of ``length`` tokens."""
    import llama_cpp

    params = llama_cpp.llama_context_default_params()
    # The length for each client, which llama.cpp rounds up to a multiple of 256.
    params.n_ctx, params.n_seq_max = clients * -(-length // 256) * 256, clients
    params.n_batch = params.n_ubatch = batch
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("llama.cpp could not make a context")
    try:
        yield context
    finally:
        llama_cpp.llama_free(context)


def _decode(context: Any, tokens: list[tuple[int, int, int]], last_only: bool) -> float:
    """Seconds of one call of llama.cpp for tokens, each with its position and client."""
    import llama_cpp

    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, (token, position, client) in enumerate(tokens):
        batch.token[i], batch.pos[i] = token, position
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, client
        batch.logits[i] = not last_only or i == len(tokens) - 1
    start = time.perf_counter()
    failed = llama_cpp.llama_decode(context, batch)
    llama_cpp.llama_synchronize(context)
    seconds = time.perf_counter() - start
    llama_cpp.llama_batch_free(batch)
    if failed:
        raise RuntimeError(f"llama_decode returned {failed}")
    return seconds


def measure(path: Path, threads: int, prompt: int, output: int, clients: int, repeats: int) -> dict[str, Any]:
    """Tokens a second, the median of ``repeats`` runs after one that is not counted."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise RuntimeError(f"llama.cpp could not load {path}")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    draw = random.Random(0)
    runs: dict[str, list[float]] = {"prefill": [], "decode_1": [], f"decode_{clients}": []}
    for users in (1, clients):
        with _context(model, users, prompt + output, prompt, threads) as context:
            memory = llama_cpp.llama_get_memory(context)
            for _ in range(repeats + 1):
                llama_cpp.llama_memory_clear(memory, True)
                first = _decode(context, [(draw.randrange(vocabulary), i, 0) for i in range(prompt)], last_only=True)
                for client in range(1, users):
                    llama_cpp.llama_memory_seq_cp(memory, 0, client, -1, -1)
                steps = [
                    [(draw.randrange(vocabulary), i, client) for client in range(users)]
                    for i in range(prompt, prompt + output)
                ]
                seconds = sum(_decode(context, step, last_only=False) for step in steps)
                runs[f"decode_{users}"].append(users * output / seconds)
                if users == 1:
                    runs["prefill"].append(prompt / first)
    llama_cpp.llama_model_free(model)
    speeds = {name: [round(speed, 2) for speed in found[1:]] for name, found in runs.items()}
    return {
        "tokens_per_second": {name: round(median(found), 2) for name, found in speeds.items()},
        "runs": speeds,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "threads": threads,
        "prompt": prompt,
        "output": output,
        "clients": clients,
        "llama_cpp_python": version("llama-cpp-python"),
        "gguf": version("gguf"),
        "system": llama_cpp.llama_print_system_info().decode().strip(" |"),
        "cpu": processor(),
        "cores": available_cores(),
        "commit": commit(),
        "load": os.getloadavg()[0],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a checkpoint to write as GGUF, or a GGUF file to measure")
    parser.add_argument("out", type=Path, nargs="?", help="the GGUF file to write; without it, MODEL is measured")
    parser.add_argument("--type", choices=TYPES, default=TYPES[0])
    parser.add_argument("--intermediate", choices=("BF16", "Q8_0"), default="BF16")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--output", type=int, default=32, help="tokens for each client")
    parser.add_argument("--clients", type=int, default=8, help="in one batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="where the line is appended")
    return parser


def main() -> None:
    """The command."""
    args = build_parser().parse_args()
    if args.out:
        intermediate = args.out.with_name(f"{args.out.name}.{args.intermediate}")
        try:
            write(args.model, intermediate, args.intermediate)
            quantize(intermediate, args.out, args.type, args.threads)
        finally:
            intermediate.unlink(missing_ok=True)
        return
    speeds = measure(args.model, args.threads, args.prompt, args.output, args.clients, args.repeats)
    line = json.dumps({"file": args.model.name, **sizes(args.model), **speeds})
    print(line)
    with args.results.open("a") as file:
        print(line, file=file)


if __name__ == "__main__":
    main()
