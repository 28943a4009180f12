"""Train a small Mixture-of-Experts language model from scratch on plain text files.

    python -m benchmarks.train OUT --text FILE... --architecture qwen2_moe --minutes 40

Quantization methods can only be judged on weights that have learned something, and the models that are
public are either large or random. This script trains small ones, in minutes on a CPU for a model of two
million parameters, or on a GPU for some hundred million. It

* holds out the last part of every file (``--held-out``, 2 percent) and writes it to ``OUT/held-out.txt``;
* trains a byte-level BPE tokenizer and then the model on the rest, reporting the held-out loss as it goes;
* saves bfloat16 safetensors, configuration and tokenizer in the layout of ``save_pretrained`` to ``OUT``, and
  to ``OUT/tokens-N`` after the N tokens named by ``--checkpoint-at``, for measurements over training time.

The model computes in bfloat16 and the optimizer keeps float32 copies of the weights, so the held-out loss is that of
the weights as saved. ``--dtype float32`` is for processors that have no products of bfloat16, where it is ten times as
fast or more; the weights are rounded when they are saved.
"""

import argparse
import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

END_OF_TEXT = "<|endoftext|>"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder to save the model in")
    add("--text", type=Path, nargs="+", required=True, metavar="FILE", help="UTF-8 text, a document a file")
    add("--held-out", type=float, default=0.02, help="fraction at the end of every file to hold out")
    add("--architecture", choices=("qwen2_moe", "mixtral", "olmoe"), default="qwen2_moe")
    add("--vocab-size", type=int, default=1536)
    add("--hidden-size", type=int, default=128)
    add("--layers", type=int, default=3)
    add("--experts", type=int, default=8)
    add("--experts-per-token", type=int, default=2)
    add("--moe-intermediate-size", type=int, default=128)
    add("--shared-intermediate-size", type=int, default=128, help="width of the shared expert of qwen2_moe")
    add("--heads", type=int, default=4)
    add("--max-positions", type=int, default=1024, help="longest context that the configuration states")
    add("--context", type=int, default=512, help="tokens in a training sequence")
    add("--batch", type=int, default=8, help="sequences in an optimizer step")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="train for this long, evaluations included")
    length.add_argument("--steps", type=int, help="train for this many optimizer steps")
    add("--lr", type=float, default=4e-3, help="highest learning rate, after the warmup")
    add("--balance", type=float, default=0.01, help="weight of the routers' load-balancing loss")
    add("--weight-decay", type=float, default=0.1)
    add("--report-every", type=int, default=500, metavar="STEPS", help="steps between evaluations")
    add("--checkpoint-at", type=int, nargs="*", default=[], metavar="TOKENS")
    add("--threads", type=int, help="CPU threads")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="what the model computes in")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def split_documents(paths: list[Path], held_out: float) -> tuple[list[str], list[str]]:
    """The training part of every document, and its end, which is held out."""
    documents = [path.read_text("utf-8") for path in paths]
    cuts = [(document, round(len(document) * (1 - held_out))) for document in documents]
    return [document[:cut] for document, cut in cuts], [document[cut:] for document, cut in cuts]


def train_tokenizer(documents: list[str], vocab_size: int, max_positions: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learned from the documents, with `END_OF_TEXT` as token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """All documents as one row of tokens, each document begun by `END_OF_TEXT`."""
    rows = tokenizer.backend_tokenizer.encode_batch(documents, add_special_tokens=False)
    return torch.cat([torch.tensor([tokenizer.bos_token_id, *row.ids], dtype=torch.int32) for row in rows])


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The model of the chosen architecture, in float32 and with random weights."""
    config = {
        "vocab_size": args.vocab_size,
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.heads,
        "num_experts_per_tok": args.experts_per_token,
        # The experts' width in mixtral and olmoe; in qwen2_moe that of dense layers, of which there are none.
        "intermediate_size": args.moe_intermediate_size,
        "max_position_embeddings": args.max_positions,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
        # 0.02 suits wide models only. Embeddings and projections keep their scale at any width with this.
        "initializer_range": math.sqrt(2 / (5 * args.hidden_size)),
    }
    if args.architecture == "mixtral":
        config |= {"num_local_experts": args.experts}
    else:
        config |= {"num_experts": args.experts, "norm_topk_prob": True}
    if args.architecture == "qwen2_moe":
        config |= {"moe_intermediate_size": args.moe_intermediate_size}
        config |= {"shared_expert_intermediate_size": args.shared_intermediate_size}
    model_config = AutoConfig.for_model(args.architecture, **config)
    model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    # One grouped matrix product for all experts: fast on a GPU, and on a CPU no slower than the loop.
    model.set_experts_implementation("grouped_mm")
    return model


def balance_loss(router_logits: tuple[torch.Tensor, ...], experts_per_token: int) -> torch.Tensor:
    """The load-balancing loss of Switch Transformers: 1 where every layer uses its experts alike.

    The one in transformers pools the layers first, so that a layer can leave an expert unused where another
    layer favours the expert of that number.
    """
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        chosen = probabilities.topk(experts_per_token).indices.flatten()
        load = torch.bincount(chosen, minlength=logits.shape[-1]) / len(chosen)
        losses.append(logits.shape[-1] * (load * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


@torch.no_grad()
def evaluate(model: PreTrainedModel, tokens: torch.Tensor, context: int, batch: int) -> float:
    """Mean loss in nats a token over the held-out tokens, cut into sequences of `context` predictions."""
    count = (len(tokens) - 1) // context
    inputs = tokens[: count * context].view(count, context).long()
    labels = tokens[1 : count * context + 1].view(count, context).long()
    model.eval()
    total = 0.0
    for x, y in zip(inputs.split(batch), labels.split(batch), strict=True):
        logits = model(input_ids=x, use_cache=False).logits.float()
        total += cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
    model.train()
    return total / (count * context)


def train(
    args: argparse.Namespace, model: PreTrainedModel, tokens: torch.Tensor, held_out: torch.Tensor
) -> Iterator[int]:
    """Train the model and report. Yields the tokens seen so far after every step."""
    # bfloat16 cannot hold the small changes of a training step. Each step changes a float32 copy of the
    # weights, and the model gets that rounded.
    masters = [weight.detach().clone() for weight in model.parameters()]
    model.to(getattr(torch, args.dtype)).train()
    weights = list(model.parameters())
    # Norms and biases are not decayed: their useful values are not near zero.
    optimizer = torch.optim.AdamW(
        [
            {"params": [m for m in masters if m.dim() > 1], "weight_decay": args.weight_decay},
            {"params": [m for m in masters if m.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=True,
    )
    generator = torch.Generator().manual_seed(args.seed)
    span = torch.arange(args.context + 1, device=tokens.device)
    step_tokens = args.batch * args.context
    start = time.perf_counter()
    step, next_report, losses = 0, 0, []
    while True:
        seconds = time.perf_counter() - start
        progress = step / args.steps if args.steps else seconds / (60 * args.minutes)
        if step >= next_report or progress >= 1:
            loss = evaluate(model, held_out, args.context, args.batch)
            train_loss, balance = torch.stack(losses).mean(0).tolist() if losses else (math.nan, math.nan)
            speed = step * step_tokens / max(seconds, 1e-9)
            print(
                f"step {step} tokens {step * step_tokens} seconds {seconds:.0f} tokens/s {speed:.0f} "
                f"balance {balance:.3f} train loss {train_loss:.4f} "
                f"held-out loss {loss:.4f} perplexity {math.exp(loss):.3f}",
                flush=True,
            )
            next_report, losses = step + args.report_every, []
        if progress >= 1:
            return

        # Warmup over the first 2 percent, then a cosine down to 1 percent of the highest rate.
        rate = min(1.0, (progress + 1e-4) / 0.02) * (0.505 + 0.495 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate
        starts = torch.randint(len(tokens) - args.context, (args.batch, 1), generator=generator)
        windows = tokens[starts.to(tokens.device) + span].long()
        output = model(input_ids=windows[:, :-1], use_cache=False, output_router_logits=True)
        loss = cross_entropy(output.logits.float().flatten(0, 1), windows[:, 1:].flatten())
        balance = balance_loss(output.router_logits, args.experts_per_token)
        (loss + args.balance * balance).backward()
        for master, weight in zip(masters, weights, strict=True):
            master.grad = weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        losses.append(torch.stack([loss, balance]).detach())
        step += 1
        yield step * step_tokens


def main() -> None:
    """Train as the command line says."""
    args = parse_arguments()
    disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.out.mkdir(parents=True, exist_ok=True)

    training, ends = split_documents(args.text, args.held_out)
    (args.out / "held-out.txt").write_text("\n".join(ends), "utf-8")
    tokenizer = train_tokenizer(training, args.vocab_size, args.max_positions)
    tokens, held_out = encode(tokenizer, training).to(device), encode(tokenizer, ends).to(device)
    model = build_model(args, tokenizer).to(device)

    def save(folder: Path) -> None:
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    print(
        f"{args.architecture} of {model.num_parameters()} parameters on {device}, "
        f"{len(tokens)} tokens of text and {len(held_out)} held out",
        flush=True,
    )
    checkpoints = sorted(args.checkpoint_at)
    for seen in train(args, model, tokens, held_out):
        while checkpoints and seen >= checkpoints[0]:
            save(args.out / f"tokens-{checkpoints.pop(0)}")
    save(args.out)


if __name__ == "__main__":
    main()
