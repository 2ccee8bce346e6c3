"""Measure the model on held-out text and let it write.

Reads data/model, data/tokens and data/tokenizer, writes reports/eval.json and reports/samples.md.
"""

from pathlib import Path

from tinygpt.device import open_device
from tinygpt.errors import program
from tinygpt.files import write_json
from tinygpt.model.weights import load_pair
from tinygpt.params import load_params
from tinygpt.report.config import EvaluateParams
from tinygpt.report.evaluation import evaluate_model, write_samples
from tinygpt.runtime import RuntimeParams
from tinygpt.tokens import load_meta, load_tokens

MODEL_DIR = Path("data/model")
TOKENS_DIR = Path("data/tokens")
TOKENIZER_DIR = Path("data/tokenizer")
REPORT_FILE = Path("reports/eval.json")
SAMPLES_FILE = Path("reports/samples.md")


@program
def main() -> None:
    """Run the stage."""
    params, runtime = load_params(EvaluateParams, RuntimeParams)
    model, tokenizer = load_pair(MODEL_DIR, TOKENIZER_DIR)
    model = model.to(open_device(runtime))
    meta = load_meta(TOKENS_DIR, tokenizer=TOKENIZER_DIR)
    tokens = load_tokens(TOKENS_DIR, params.split, at_least=2)
    report = evaluate_model(model, tokens, params, n_bytes=meta.split(params.split).bytes)
    write_json(REPORT_FILE, report)
    write_samples(SAMPLES_FILE, model, tokenizer, params)
    print(
        f"evaluate: {params.split} split, {report['tokens']:,} tokens, context {report['context']}: "
        f"loss {report['loss']:.4f} ± {report['loss_error']:.4f} nats per token, perplexity {report['ppl']:.2f}, "
        f"{report['bpb']:.4f} bits per byte"
    )


if __name__ == "__main__":
    main()
