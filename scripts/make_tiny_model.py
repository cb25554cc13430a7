"""Makes a tiny language model to test with: 26 MB, in seconds, the same each time. It speaks nonsense.

It needs torch and transformers, which the vLLM images have, and no network:

    ./scripts/make_tiny_model.sh FOLDER
"""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 512
CONTEXT = 2048
LAYERS = 16  # a step must take a few milliseconds, or the engine is ahead of all who want to watch it
TEXT = [
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs.",
    "A session holds a lease on a GPU; a task waits in its queue; a worker streams what happens.",
    "Grüße aus Köln, żółw, naïve café, 東京と大阪, Привет, мир! 🙂🚀 0123456789 {[(\"':;,.?!-_/\\|<>)]}",
] * 4
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as most models have it: a character may be split between tokens."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet)
    found.train_from_iterator(TEXT, trainer)
    # As Llama's: whoever adds it a second time gets other text.
    begin = SPECIAL[0]
    found.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, found.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=found,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
    )


def model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=256,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            bos_token_id=0,
            eos_token_id=1,
            tie_word_embeddings=False,
            initializer_range=0.2,  # so large that the most probable token is so by far
        )
    )


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    tokenizer().save_pretrained(folder)
    model().save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # a worker has a uid of its own
    print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir())} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
