"""What the Qwen families of the goldens share: generations of config keys and processor files, M-RoPE, image features."""

import json
import shutil

import torch

from .base import TEMPLATE, VOCABULARY, Family, write_json, write_tokenizer

IDS = {"image_token_id": 613, "video_token_id": 614, "vision_start_token_id": 610, "vision_end_token_id": 611}
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]


def text_keys(v):
    """Keys of the language model that all generations spell alike."""
    return {
        "attention_dropout": 0.0, "bos_token_id": 607, "eos_token_id": 609, "hidden_act": "silu",
        "hidden_size": v["hidden"], "initializer_range": 0.02, "intermediate_size": v["inter"],
        "max_position_embeddings": 4096, "max_window_layers": v["layers"], "num_attention_heads": v["heads"],
        "num_hidden_layers": v["layers"], "num_key_value_heads": v["kv"], "rms_norm_eps": v["eps"], "use_cache": True,
        "use_sliding_window": False, "vocab_size": VOCABULARY,
    }


class Qwen(Family):
    """Keys of a variant beside the shared ones: `generation` ("flat", "nested" or "parameters"), `section` and `theta` of the
    rotary embedding, `eps`, `embed`, `vision_heads`, `depth`, `vision` (before `blocks.N.`), `limit` (largest number of tokens
    an image may take: small to keep sequences short, different so that they have to be read)."""

    model_class = None
    patch = 14

    def vision_config(self, v, flat):
        """vision_config; `flat`: of the first hub checkpoints, which leave out what equals the class defaults."""
        raise NotImplementedError

    def config(self, name):
        v = self.variants[name]
        root = {"architectures": [self.model_class.__name__], "model_type": self.model_type, **IDS}
        if v["generation"] == "flat":
            # As the first hub checkpoints: text keys at the root, and two dead keys.
            return root | text_keys(v) | {
                "rope_scaling": {"type": "mrope", "mrope_section": v["section"]}, "rope_theta": v["theta"],
                "sliding_window": 32768, "tie_word_embeddings": v["tied"], "torch_dtype": "bfloat16",
                "transformers_version": "4.41.2", "vision_token_id": 612, "vision_config": self.vision_config(v, True),
            }
        vision = self.vision_config(v, False)
        text = text_keys(v) | {
            "model_type": self.model_type + "_text", "layer_types": ["full_attention"] * v["layers"],
        }
        if v["generation"] == "nested":
            text |= {
                "rope_scaling": {"mrope_section": v["section"], "rope_type": "default", "type": "default"},
                "rope_theta": v["theta"], "sliding_window": None, "torch_dtype": "float16",
            }
            return root | {
                "text_config": text, "vision_config": vision, "tie_word_embeddings": v["tied"],
                "torch_dtype": "float16", "transformers_version": "4.52.4",
            }
        # The tie flag stands in text_config alone.
        text |= {
            "rope_parameters": {
                "mrope_section": v["section"], "rope_theta": v["theta"], "rope_type": "default", "type": "mrope",
            },
            "dtype": "float32", "sliding_window": None, "tie_word_embeddings": v["tied"],
        }
        vision |= {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"}, "dtype": "float32"}
        return root | {
            "text_config": text, "vision_config": vision, "dtype": "float32", "transformers_version": "5.23.0",
        }

    def write_processor(self, name, folder):
        v = self.variants[name]
        write_tokenizer(folder)
        for file in ("tokenizer_config.json", "generation_config.json"):
            shutil.copyfile(TEMPLATE / file, folder / file)
        base = {
            "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": MEAN,
            "image_std": STD, "merge_size": 2, "patch_size": self.patch, "resample": 3, "rescale_factor": 1 / 255,
            "temporal_patch_size": 2,
        }
        old = base | {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": self.processor_class}
        smallest, largest = 4 * (2 * self.patch) ** 2, v["limit"] * (2 * self.patch) ** 2
        if v["generation"] == "flat":
            write_json(folder / "preprocessor_config.json", old | {"min_pixels": smallest, "max_pixels": largest})
            template = (TEMPLATE / "chat_template.jinja").read_text()
            write_json(folder / "chat_template.json", {"chat_template": template})
            return
        shutil.copyfile(TEMPLATE / "chat_template.jinja", folder / "chat_template.jinja")
        size = {"shortest_edge": smallest, "longest_edge": largest}
        if v["generation"] == "nested":
            write_json(folder / "preprocessor_config.json", old | {"size": size})
            return
        processor = json.loads((TEMPLATE / "processor_config.json").read_text())
        processor["image_processor"]["size"] = size
        write_json(folder / "processor_config.json", processor)

    def state_key(self, key):
        key = key.removeprefix("model.").removeprefix("language_model.")
        key = key if key.startswith(("visual.", "lm_head.")) else "language_model." + key
        return key if key.startswith("lm_head.") else "model." + key

    def check_config(self, name, model, processor):
        v, text, vision = self.variants[name], model.config.text_config, model.config.vision_config
        assert text.rope_parameters["rope_theta"] == v["theta"], text.rope_parameters
        assert list(text.rope_parameters["mrope_section"]) == v["section"], text.rope_parameters
        assert text.rms_norm_eps == v["eps"] and text.num_key_value_heads == v["kv"]
        assert vision.num_heads == v["vision_heads"] and vision.patch_size == self.patch
        assert (model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()) == v["tied"]
        size, pixels = processor.image_processor.size, (2 * self.patch) ** 2
        assert (size["shortest_edge"], size["longest_edge"]) == (4 * pixels, v["limit"] * pixels), size

    def positions(self, model, inputs):
        """M-RoPE: `get_rope_index` where there are images, else counting."""
        if "image_grid_thw" not in inputs:
            return super().positions(model, inputs)
        ids, types = inputs["input_ids"], inputs["mm_token_type_ids"]
        return model.model.get_rope_index(ids, types, image_grid_thw=inputs["image_grid_thw"])[0][:, 0]

    def rotary(self, model, place, dtype):
        return model.model.language_model.rotary_emb(torch.zeros(1, dtype=dtype), place[:, None])

    def features(self, model, inputs):
        vision = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        return torch.cat(list(vision.pooler_output)), []

    def image_tensors(self, inputs):
        return {"image_grid": inputs["image_grid_thw"][:, 1:].int()}
