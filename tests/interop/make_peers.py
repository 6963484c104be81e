"""Make tests/interop/peers: checkpoints that pyreft and AdapterHub write, and what they compute from them.

Run in the environment of `make peers`: .venv-peers/bin/python tests/interop/make_peers.py
Each case is a folder with `base` (the model, shared by its cases), `adapter` (as the library saves it) and
`expected.safetensors` (rows of token ids, and the library's own logits for each).
"""

import json
from pathlib import Path

import adapters
import pyreft
import torch
import transformers as hf
from safetensors.torch import save_file

OUT = Path(__file__).parent / "peers"
COMMON = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    **COMMON,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
BERT = {**{k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}, "num_hidden_layers": 2}
BASES = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**LLAMA)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(**COMMON, n_embd=20, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)
    ),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**{**LLAMA, "num_key_value_heads": 2})),
    "llama-cls": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**LLAMA, num_labels=3)),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**BERT)),
    "bert-cls": lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT, num_labels=3)),
}
CLASSES = {
    "llama-cls": hf.LlamaForSequenceClassification,
    "roberta": hf.RobertaForSequenceClassification,
    "bert-cls": hf.BertForSequenceClassification,
}


def base_of(name, **options):
    """The saved model, loaded as its task's class."""
    folder = OUT / "bases" / name
    if not folder.exists():
        torch.manual_seed(len(name))
        BASES[name]().save_pretrained(folder)
    return CLASSES.get(name, hf.AutoModelForCausalLM).from_pretrained(folder, dtype=torch.float32, **options).eval()


def rows_of(count=3, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 64, (1, 11 + 4 * i), generator=random) for i in range(count)]


def finish(case, base, facts, logits):
    tensors = {f"ids.{i}": ids for i, ids in enumerate(rows_of())}
    tensors |= {f"logits.{i}": value.detach().contiguous() for i, value in enumerate(logits)}
    save_file(tensors, OUT / case / "expected.safetensors")
    (OUT / case / "facts.json").write_text(json.dumps({"base": base, **facts}, indent=1) + "\n")


def shaken(module):
    """Parameters moved as training would move them: of torch's Householder vectors only what is below the diagonal."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                noise = 0.3 * torch.randn_like(parameter)
                if name.endswith(".original"):
                    noise = noise.tril(-1) if noise.shape[0] >= noise.shape[1] else noise.triu(1)
                parameter.add_(noise)


def make_pyreft(case, base, kind, component, layers, first, last, tied, seed, **options):
    torch.manual_seed(seed)
    model = base_of(base)
    width = model.config.hidden_size
    given = {"low_rank_dimension": options.pop("r", 3), "dtype": torch.float32, "add_bias": False, **options}
    places = [
        {
            "layer": layer,
            "component": component.replace("%", str(layer)),
            "low_rank_dimension": given["low_rank_dimension"],
            "intervention": getattr(pyreft, kind)(embed_dim=width, **given),
        }
        for _ in range(1 if tied else 2)
        for layer in layers
    ]
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=places), set_device=False)
    head = base in CLASSES
    for name, parameter in model.named_parameters():
        parameter.requires_grad = head and name.startswith("score")
    for place in places:
        shaken(place["intervention"])
    if head:
        shaken(model.score)
    reft.save(str(OUT / case / "adapter"), include_model=head)
    logits = []
    for ids in rows_of():
        n = ids.shape[1]
        prefix, suffix = list(range(first)), list(range(n - last, n))
        groups = [prefix + suffix] if tied else [prefix, suffix]
        where = [[group] for group in groups for _ in layers]
        with torch.no_grad():
            _, output = reft({"input_ids": ids}, unit_locations={"sources->base": (None, where)})
        logits.append(output.logits[0])
    positions = "+".join(f"{end}{count}" for end, count in (("f", first), ("l", last)) if count)
    activation = {"act_fn": "activation"}
    facts = {activation[k]: v for k, v in options.items() if k in activation}
    finish(case, base, {"positions": positions, **facts}, logits)


def make_adapterhub(case, base, config, seed, **facts):
    torch.manual_seed(seed)
    labels = {"num_labels": 3} if base in CLASSES else {}
    model = base_of(base, **labels)
    adapters.init(model)
    model.add_adapter("x", config=config)
    model.set_active_adapters("x")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".refts." in name or (base in CLASSES and name.startswith("classifier"))
    shaken(model)
    model.eval()
    (OUT / case).mkdir()
    model.save_adapter(str(OUT / case / "adapter"), "x", with_head=True)
    with torch.no_grad():
        finish(case, base, facts, [model(input_ids=ids).logits[0] for ids in rows_of()])


PYREFT = {
    "consreft": ("llama", "ConsreftIntervention", "block_output", [0, 1, 2], 3, 2, True),
    "lobireft": ("llama", "LobireftIntervention", "block_output", [2, 1], 0, 1, True),
    "direft": ("gpt2", "DireftIntervention", "block_output", [0, 1], 2, 2, False),
    "noreft": ("qwen2", "NoreftIntervention", "mlp_output", [1], 4, 0, True),
    "nodireft-gelu": ("llama", "NodireftIntervention", "block_output", [0, 2], 1, 3, False),
    "attention": ("gpt2", "LoreftIntervention", "attention_output", [0, 1], 2, 3, True),
    "path": ("phi", "LoreftIntervention", "model.layers[%].output", [0, 2], 1, 1, True),
    "path-mlp": ("phi", "LoreftIntervention", "model.layers[%].mlp.output", [1], 0, 2, True),
    "path-linear": ("phi", "LobireftIntervention", "model.layers[%].self_attn.v_proj.output", [1], 1, 2, True),
    "classifier": ("llama-cls", "LoreftIntervention", "block_output", [0, 1], 2, 2, False),
    "full-rank": ("llama", "LoreftIntervention", "block_output", [1], 1, 1, True),
}
OPTIONS = {
    "direft": {"r": 5},
    "noreft": {"add_bias": True},
    "nodireft-gelu": {"act_fn": "gelu"},
    "full-rank": {"r": 16},
}
LOREFT, NOREFT, DIREFT = adapters.LoReftConfig, adapters.NoReftConfig, adapters.DiReftConfig
ADAPTERHUB = {
    "tied": ("gpt2", LOREFT(prefix_positions=2, suffix_positions=3, r=4, tied_weights=True)),
    "prefix": ("llama", LOREFT(layers=[0, 2], prefix_positions=3, r=2)),
    "suffix": ("llama", NOREFT(prefix_positions=0, suffix_positions=2, r=2, non_linearity="swish")),
    "classifier": ("roberta", LOREFT(prefix_positions=1, suffix_positions=1, r=16)),
    "direft": ("bert-cls", DIREFT(layers=[1], prefix_positions=2, suffix_positions=1, r=3)),
}
FACTS = {"suffix": {"method": "noreft"}, "direft": {"method": "direft"}}


def main():
    for seed, (case, arguments) in enumerate(PYREFT.items()):
        make_pyreft(f"pyreft-{case}", *arguments, seed, **OPTIONS.get(case, {}))
    for seed, (case, arguments) in enumerate(ADAPTERHUB.items()):
        make_adapterhub(f"adapterhub-{case}", *arguments, seed, **FACTS.get(case, {}))


if __name__ == "__main__":
    main()
