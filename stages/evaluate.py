"""Measure the model on held-out text and let it write samples.

Reads data/model, data/tokens and data/tokenizer, writes reports/eval.json, samples.md and details.json.
"""

from pathlib import Path

from tinygpt.corpus.folders import SPLITS
from tinygpt.files import write_json
from tinygpt.model.weights import load_pair
from tinygpt.params import PARAMS_FILE, load_params
from tinygpt.paths import MODEL, REPORTS, TOKENIZER, TOKENS
from tinygpt.report.config import EvaluateParams
from tinygpt.report.details import details, make_samples, prompt_to_try, write_details, write_samples
from tinygpt.report.perplexity import evaluate_model
from tinygpt.runtime import RuntimeParams, open_device
from tinygpt.stage import run_stage
from tinygpt.tokens import load_meta, load_tokens


def run(root: Path) -> None:
    """Run the stage in the project's folder."""
    params, runtime = load_params(EvaluateParams, RuntimeParams, path=root / PARAMS_FILE)
    model, tokenizer = load_pair(root / MODEL, root / TOKENIZER)
    model = model.to(open_device(runtime))
    meta = load_meta(root / TOKENS, tokenizer=root / TOKENIZER)
    tokens = load_tokens(root / TOKENS, params.split, at_least=2)
    report = evaluate_model(model, tokens, params, n_bytes=meta.split(params.split).bytes)
    decisive = {"eval_loss": report["loss"], "eval_tokens": report["tokens"]}
    decisive |= {name: report[name] for name in ("ppl", "bpb", "bpb_error")}
    write_json(root / REPORTS / "metrics/eval.json", decisive)  # DVC's metrics
    samples = make_samples(model, tokenizer, tokens, params)
    write_json(root / REPORTS / "eval.json", report | {"prompt": prompt_to_try(samples)})
    write_samples(root / REPORTS / "samples.md", samples)
    splits = {name: load_tokens(root / TOKENS, name) for name in SPLITS if meta.split(name).tokens}
    write_details(root / REPORTS / "details.json", details(model, tokenizer, meta, splits, samples))
    print(
        f"evaluate: {params.split} split, {report['tokens']:,} tokens, context {report['context']}: "
        f"loss {report['loss']:.4f} ± {report['loss_error']:.4f} nats per token, perplexity {report['ppl']:.2f}, "
        f"{report['bpb']:.4f} bits per byte"
    )


if __name__ == "__main__":
    run_stage(run)
