from deme_core.needed_files import needed_files


def test_of_a_published_pipeline_only_what_stock_diffusers_loads_is_needed() -> None:
    needed = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "safety_checker/config.json",
        "safety_checker/pytorch_model.bin",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder_2/model-00001-of-00002.safetensors",
        "text_encoder_2/model-00002-of-00002.safetensors",
        "text_encoder_2/model.safetensors.index.json",
        "tokenizer/merges.txt",
        "tokenizer/spiece.model",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    others = [
        ".gitattributes",
        "README.md",
        "v1-5-pruned-emaonly.safetensors",
        "v1-5-pruned.ckpt",
        "safety_checker/model.fp16.safetensors",
        "text_encoder/flax_model.msgpack",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
        "text_encoder_2/model-00001-of-00002.fp16.safetensors",
        "text_encoder_2/model.safetensors.fp16.index.json",
        "text_encoder_2/model.fp16-00001-of-00002.safetensors",
        "text_encoder_2/model.safetensors.index.fp16.json",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "vae_decoder/model.onnx",
    ]
    assert needed_files([*others, *needed]) == sorted(needed)


def test_a_model_in_one_folder_keeps_its_weights_whatever_its_shards_are_called() -> None:
    names = ["a.safetensors", "b.safetensors", "config.json", "scheduler_config.json"]
    index = "diffusion_pytorch_model.safetensors.index.json"
    assert needed_files([*names, index, "model.ckpt"]) == sorted([*names, index])
    # google/ddpm-cifar10-32
    flat = ["config.json", "diffusion_pytorch_model.safetensors", "model_index.json", "scheduler_config.json"]
    assert needed_files([*flat, "diffusion_pytorch_model.bin"]) == flat
    assert needed_files(["config.json", "diffusion_pytorch_model.bin"]) == [
        "config.json",
        "diffusion_pytorch_model.bin",
    ]


def test_half_precision_stands_for_plain_weights_that_a_part_does_not_have() -> None:
    needed = [
        "model_index.json",
        "text_encoder/model.safetensors",
        "text_encoder_2/model.fp16-00001-of-00002.safetensors",
        "text_encoder_2/model.fp16-00002-of-00002.safetensors",
        "text_encoder_2/model.safetensors.index.fp16.json",
        "text_encoder_3/model-00001-of-00002.fp16.safetensors",
        "text_encoder_3/model-00002-of-00002.fp16.safetensors",
        "text_encoder_3/model.safetensors.fp16.index.json",
        "transformer/diffusion_pytorch_model-00001-of-00001.fp16.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.fp16.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.bin",
    ]
    others = [
        "text_encoder/model.fp16.safetensors",
        "text_encoder_3/openvino_model.bin",
        "text_encoder_3/pytorch_model-00001-of-00002.fp16.bin",
        "transformer/diffusion_pytorch_model-00001-of-00001.non_ema.safetensors",
        "unet/diffusion_pytorch_model.bf16.safetensors",
        "unet/diffusion_pytorch_model.fp16.bin",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "vae_2/diffusion_pytorch_model.non_ema.safetensors",
    ]
    assert needed_files([*others, *needed]) == sorted(needed)
