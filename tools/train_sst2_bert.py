"""Trains a small BERT classifier on SST-2 files, from nothing, in a few minutes on two cores.

    python tools/train_sst2_bert.py --train sst2.train.tsv --dev sst2.dev.tsv --out bert

Each line of a file is a sentence, a tab, and 0 (negative) or 1 (positive).  Makes a folder that `from_pretrained`
opens: a WordPiece tokenizer learnt on the train sentences, and a `BertForSequenceClassification` of 4 blocks, width
128, 4 heads, intermediate width 512.  It is a model to prune where encoders are concerned: classification, padding,
post-norm blocks, biases everywhere.

The loop is the ordinary one: AdamW, linear warm-up and decay, dropout, words left out at random, batches of sentences
of like length.  The weights of the epoch that was best on the dev sentences are kept.  Nothing is drawn outside the
seed, so that a second run on the same machine gives the same model.
"""

import argparse
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = 4000
LONGEST = 64
BATCH = 64
LEFT_OUT = 0.1

Example = tuple[list[int], int]


def read(file: Path) -> tuple[list[str], list[int]]:
    rows = [line.rsplit("\t", 1) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [sentence for sentence, _ in rows], [int(label) for _, label in rows]


def train_tokenizer(sentences: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, SPECIAL.index(name)) for name in ("[CLS]", "[SEP]")]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LONGEST, **names)


def encode(tokenizer: PreTrainedTokenizerFast, file: Path) -> list[Example]:
    sentences, labels = read(file)
    return list(zip(tokenizer(sentences, truncation=True)["input_ids"], labels, strict=True))


def padded(examples: list[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers, mask and labels of a batch."""
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(numbers) for numbers, _ in examples], batch_first=True)
    return tokens, (tokens != SPECIAL.index("[PAD]")).long(), torch.tensor([label for _, label in examples])


def batches(examples: list[Example], generator: torch.Generator) -> list[list[Example]]:
    """Shuffled, then sorted by length within chunks of sixteen batches, so that little is padded."""
    order = torch.randperm(len(examples), generator=generator).tolist()
    made: list[list[Example]] = []
    for start in range(0, len(order), 16 * BATCH):
        chunk = sorted(order[start : start + 16 * BATCH], key=lambda index: len(examples[index][0]))
        made += [[examples[index] for index in chunk[at : at + BATCH]] for at in range(0, len(chunk), BATCH)]
    return [made[index] for index in torch.randperm(len(made), generator=generator).tolist()]


@torch.no_grad()
def accuracy(model: nn.Module, examples: list[Example]) -> float:
    model.eval()
    right = 0
    for start in range(0, len(examples), 128):
        tokens, mask, labels = padded(examples[start : start + 128])
        right += int((model(input_ids=tokens, attention_mask=mask).logits.argmax(-1) == labels).sum())
    return right / len(examples)


def train(model: nn.Module, examples: list[Example], dev: list[Example], epochs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))
    steps = epochs * -(-len(examples) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (steps // 10), (steps - step) / (steps - steps // 10))
    )
    best, kept, begun = 0.0, model.state_dict(), time.perf_counter()
    for epoch in range(epochs):
        model.train()
        total = 0.0
        made = batches(examples, generator)
        for batch in made:
            tokens, mask, labels = padded(batch)
            drop = (torch.rand(tokens.shape, generator=generator) < LEFT_OUT) & (tokens >= len(SPECIAL))
            tokens = tokens.masked_fill(drop, SPECIAL.index("[MASK]"))
            loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.item()
        measured = accuracy(model, dev)
        seconds = time.perf_counter() - begun
        print(f"epoch {epoch + 1}/{epochs} loss {total / len(made):.4f} dev {measured:.4f} {seconds:.0f} s", flush=True)
        if measured > best:
            best, kept = measured, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--dev", type=Path, required=True)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()

    tokenizer = train_tokenizer(read(asked.train)[0])
    torch.manual_seed(asked.seed)  # initial weights and dropout; this is a script, nobody shares its generator
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=LONGEST, pad_token_id=SPECIAL.index("[PAD]"), num_labels=2,
        hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    dev = encode(tokenizer, asked.dev)
    train(model, encode(tokenizer, asked.train), dev, asked.epochs, asked.seed)
    print(f"kept: dev {accuracy(model, dev):.4f}")
    if asked.test is not None:
        print(f"test {accuracy(model, encode(tokenizer, asked.test)):.4f}")
    model.save_pretrained(asked.out)
    tokenizer.save_pretrained(asked.out)


if __name__ == "__main__":
    main()
