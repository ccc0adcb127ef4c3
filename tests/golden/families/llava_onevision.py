"""LLaVA-OneVision: hub names tied and untied, names of transformers 5; towers whose image no patch divides; one head of 72."""

import json
import shutil

import torch
from PIL import Image
from transformers import LlavaOnevisionForConditionalGeneration

from .base import TEMPLATE, VOCABULARY, Draw, Family, write_json, write_tokenizer

# The template of the hub's checkpoints: no line break after a turn, a space behind the role.
CHAT = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\\n' + content['text'] }}{% endfor %}"
    "{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\\n' + content['text'] }}{% endgeneration %}{% endfor %}"
    "{% endif %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class LlavaOnevision(Family):
    """Keys of a variant beside the shared ones: `generation` of the files ("hub", "resaved" or "v5"), `theta`, `side` of the
    tower's image, `tiles` (rows, columns) to choose from, `most` of `anyres_max_N`, `width`, `vision_inner`, `vision_heads`,
    `depth`, `vision` (before `embeddings.`), `rest` (before the projector)."""

    model_type = "llava_onevision"
    model_class = LlavaOnevisionForConditionalGeneration
    variants = {
        # As llava-onevision-qwen2-0.5b-ov-hf.
        "llava-hub-tied-f16": dict(
            generation="hub", dtype=torch.float16, seed=301, hidden=64, inter=96, layers=2, heads=4, kv=2, theta=1e6,
            tied=True, shards=1, language="language_model.model.", vision="vision_tower.vision_model.", rest="",
            side=48, tiles=[(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1)], most=9,
            width=144, vision_inner=100, vision_heads=2, depth=2, brief=True,
        ),
        # As the larger ones, saved again by transformers 5.
        "llava-resaved-f16-sharded": dict(
            generation="resaved", dtype=torch.float16, seed=302, hidden=32, inter=64, layers=2, heads=2, kv=1, theta=1e6,
            tied=False, shards=3, language="language_model.model.", lm_head="language_model.lm_head",
            vision="vision_tower.", rest="", side=42, tiles=[(1, 1), (2, 2), (3, 2), (2, 3), (3, 3), (2, 4)], most=1,
            width=32, vision_inner=48, vision_heads=2, depth=1, brief=True,
        ),
        "llava-v5-f32": dict(
            generation="v5", dtype=torch.float32, seed=303, hidden=64, inter=96, layers=2, heads=4, kv=4, theta=1e4,
            tied=False, shards=1, language="model.language_model.", vision="model.vision_tower.", rest="model.",
            side=45, tiles=[(3, 4), (4, 3), (1, 3), (3, 1), (2, 2), (5, 5)], most=2,
            width=48, vision_inner=64, vision_heads=3, depth=3, brief=True, greedy=True,
        ),
    }

    def resolutions(self, v):
        return [[rows * v["side"], columns * v["side"]] for rows, columns in v["tiles"]]

    def config(self, name):
        v = self.variants[name]
        vision = {
            "hidden_size": v["width"], "image_size": v["side"], "intermediate_size": v["vision_inner"],
            "model_type": "siglip_vision_model", "num_attention_heads": v["vision_heads"],
            "num_hidden_layers": v["depth"], "patch_size": 14, "vision_use_head": False,
        }
        # Hub files leave out what equals the class defaults: the norms' epsilon, the activation.
        text = {
            "bos_token_id": 607, "eos_token_id": 609, "hidden_size": v["hidden"], "intermediate_size": v["inter"],
            "max_window_layers": v["layers"], "model_type": "qwen2", "num_attention_heads": v["heads"],
            "num_hidden_layers": v["layers"], "num_key_value_heads": v["kv"], "rope_theta": v["theta"],
            "sliding_window": 32768, "tie_word_embeddings": v["tied"], "torch_dtype": "bfloat16",
            "vocab_size": VOCABULARY,
        }
        root = {
            "architectures": ["LlavaOnevisionForConditionalGeneration"], "image_grid_pinpoints": self.resolutions(v),
            "image_token_index": 613, "model_type": self.model_type, "projector_hidden_act": "gelu",
            "text_config": text, "tie_word_embeddings": False, "torch_dtype": "float16",
            "transformers_version": "4.45.0.dev0", "use_image_newline_parameter": True, "video_token_index": 614,
            "vision_aspect_ratio": f"anyres_max_{v['most']}", "vision_config": vision, "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        }
        if v["generation"] == "hub":
            return root
        vision |= {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "num_channels": 3}
        if v["generation"] == "resaved":
            return root | {"transformers_version": "4.52.4"}
        del text["rope_theta"], text["torch_dtype"], text["sliding_window"], root["torch_dtype"]
        text |= {
            "dtype": "float32", "hidden_act": "silu", "layer_types": ["full_attention"] * v["layers"],
            "rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": v["theta"], "rope_type": "default"},
            "sliding_window": None, "use_sliding_window": False,
        }
        del root["image_token_index"], root["video_token_index"]
        return root | {
            "dtype": "float32", "image_token_id": 613, "multimodal_projector_bias": True,
            "transformers_version": "5.23.0", "video_token_id": 614,
        }

    def tensors(self, v):
        draw = Draw(v["seed"])
        draw.decoder(v)
        width, hidden, tower, rest = v["width"], v["hidden"], v["vision"], v["rest"]
        # Normalised pixels lie around 0 with a standard deviation near 0.5; there are 588 of them.
        draw.made[tower + "embeddings.patch_embedding.weight"] = draw.normal(width, 3, 14, 14, std=2 * 588**-0.5)
        draw.made[tower + "embeddings.patch_embedding.bias"] = draw.normal(width, std=0.3)
        places = (v["side"] // 14) ** 2
        draw.made[tower + "embeddings.position_embedding.weight"] = draw.normal(places, width, std=0.5)
        for layer in range(v["depth"]):
            at = f"{tower}encoder.layers.{layer}."
            draw.norm(at + "layer_norm1", width, bias=True)
            draw.norm(at + "layer_norm2", width, bias=True)
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                draw.linear(at + "self_attn." + part, width, width, bias=True, gain=1.4 if part[0] in "qk" else 1.0)
            draw.linear(at + "mlp.fc1", v["vision_inner"], width, bias=True)
            draw.linear(at + "mlp.fc2", width, v["vision_inner"], bias=True)
        # Stands in the file, and must not be used.
        draw.norm(tower + "post_layernorm", width, bias=True)
        draw.linear(rest + "multi_modal_projector.linear_1", hidden, width, bias=True)
        draw.linear(rest + "multi_modal_projector.linear_2", hidden, hidden, bias=True, gain=1.5)
        draw.made[rest + "image_newline"] = draw.normal(hidden, std=0.6)
        return draw.made

    def write_processor(self, name, folder):
        v = self.variants[name]

        def rename(text):
            text = text.replace("<|image_pad|>", "<image>").replace("<|video_pad|>", "<video>")
            return text.replace("Qwen2VLProcessor", "LlavaOnevisionProcessor")

        write_tokenizer(folder, rename)
        config = (TEMPLATE / "tokenizer_config.json").read_text()
        (folder / "tokenizer_config.json").write_text(rename(config))
        shutil.copyfile(TEMPLATE / "generation_config.json", folder / "generation_config.json")
        size = {"height": v["side"], "width": v["side"]}
        images = {
            "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
            "image_grid_pinpoints": self.resolutions(v), "image_mean": [0.5] * 3,
            "image_processor_type": "LlavaOnevisionImageProcessor", "image_std": [0.5] * 3, "resample": 3,
            "rescale_factor": 1 / 255, "size": size,
        }
        processor = {
            "num_image_tokens": (v["side"] // 14) ** 2, "processor_class": "LlavaOnevisionProcessor",
            "vision_aspect_ratio": f"anyres_max_{v['most']}", "vision_feature_select_strategy": "full",
        }
        videos = {"size": size, "video_processor_type": "LlavaOnevisionVideoProcessor"}
        if v["generation"] == "hub":
            crop = {"crop_size": size, "do_center_crop": True, "do_pad": True}
            write_json(folder / "preprocessor_config.json", images | crop)
            write_json(folder / "video_preprocessor_config.json", videos)
            write_json(folder / "processor_config.json", processor)
            write_json(folder / "chat_template.json", {"chat_template": CHAT})
            return
        (folder / "chat_template.jinja").write_text(CHAT)
        if v["generation"] == "resaved":
            write_json(folder / "preprocessor_config.json", images)
            write_json(folder / "video_preprocessor_config.json", videos)
            write_json(folder / "processor_config.json", processor)
            return
        nested = {"image_processor": images | {"do_pad": True}, "video_processor": videos}
        write_json(folder / "processor_config.json", nested | processor)

    def state_key(self, key):
        if key.startswith("model."):
            return key
        key = key.replace("language_model.model.", "language_model.").replace("vision_model.", "")
        return "lm_head.weight" if key.endswith("lm_head.weight") else "model." + key

    def check_config(self, name, model, processor):
        v, text, vision = self.variants[name], model.config.text_config, model.config.vision_config
        assert text.rope_parameters["rope_theta"] == v["theta"], text.rope_parameters
        assert text.rms_norm_eps == (1e-5 if v["generation"] == "v5" else 1e-6)
        assert vision.layer_norm_eps == 1e-6 and vision.hidden_act == "gelu_pytorch_tanh"
        assert model.config.image_token_id == 613 and processor.image_token_id == 613
        assert (model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()) == v["tied"]
        assert processor.image_processor.image_grid_pinpoints == model.config.image_grid_pinpoints == self.resolutions(v)
        assert list(processor.image_processor.image_mean) == [0.5] * 3
        assert processor.num_image_tokens == (v["side"] // 14) ** 2

    def draw_images(self, folder):
        """A tall one, and lines of which no row or no column of a tile's features is left."""
        tall = Image.new("RGB", (40, 210))
        tall.putdata([((y // 11 * 41) % 256, 6 * x, (x * x + 3 * y) % 256) for y in range(210) for x in range(40)])
        tall.save(folder / "tall-40x210.png", optimize=True)
        for width, height in ((100, 1), (1, 100)):
            line = Image.new("RGB", (width, height))
            line.putdata([(2 * i, 255 - i, (i * i) % 256) for i in range(100)])
            line.save(folder / f"line-{width}x{height}.png", optimize=True)

    def conversations(self, name):
        def asked(key, file):
            turns = [
                {"role": "user", "content": [
                    {"type": "image", "image": f"images/{file}.png"}, {"type": "text", "text": "how many bars?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "7"}]},
            ]
            return {"id": key, "messages": turns}

        rows = [asked("tall-image", "tall-40x210")]
        if self.variants[name]["generation"] == "resaved":
            rows += [asked("wide-line", "line-100x1"), asked("tall-line", "line-1x100")]
        return rows

    def rotary(self, model, place, dtype):
        return model.model.language_model.rotary_emb(torch.zeros(1, dtype=dtype), place[:1])

    def features(self, model, inputs):
        vision = model.model.get_image_features(
            inputs["pixel_values"], inputs["image_sizes"], batch_num_images=inputs["batch_num_images"]
        )
        return torch.cat(list(vision.pooler_output)), []

    def image_tensors(self, inputs):
        return {"image_sizes": inputs["image_sizes"].int()}
