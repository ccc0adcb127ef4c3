//! A checkpoint of real width with random weights, to measure memory and time on before a long run.
//!
//! ```sh
//! cargo run --release --example wide_checkpoint -- OUT [--hidden 1536 --intermediate 8960 --heads 12 --kv-heads 2 --blocks 3] [--sparse]
//! ```
//!
//! The default is Qwen2-VL-2B's block; `--hidden 3584 --intermediate 18944 --heads 28 --kv-heads 4 --blocks 28` is Qwen2-VL-7B.
//! Tokenizer, processor and vision tower are those of the small checkpoint (`--small FOLDER`), its merger's output widened.
//! Weights are bfloat16, normal with variance 1/in, so that activations keep their size; the same on every machine.

use anyhow::{Context, Result, ensure};
use clap::Parser;
use half::bf16;
use rayon::prelude::*;
use safetensors::SafeTensors;
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::fs::{self, File};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::PathBuf;

/// What to write where.
#[derive(Parser)]
pub struct Arguments {
    /// Folder to write; it must not exist.
    out: PathBuf,
    #[arg(long, default_value_t = 1536)]
    hidden: usize,
    #[arg(long, default_value_t = 8960)]
    intermediate: usize,
    #[arg(long, default_value_t = 12)]
    heads: usize,
    #[arg(long, default_value_t = 2)]
    kv_heads: usize,
    #[arg(long, default_value_t = 3)]
    blocks: usize,
    /// Leave holes in place of random weights: zeros that take no room on the disk.
    #[arg(long)]
    sparse: bool,
    /// The small checkpoint.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tiny-qwen2-vl"))]
    small: PathBuf,
}

/// What a tensor holds.
enum Content<'a> {
    Bytes(&'a [u8]),
    Ones,
    Zeros,
    Normal,
}

struct Tensor<'a> {
    name: String,
    shape: Vec<usize>,
    content: Content<'a>,
}

impl Tensor<'_> {
    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * size_of::<bf16>()
    }

    /// `seed` tells tensors apart.
    fn data(&self, seed: u64) -> Cow<'_, [u8]> {
        match self.content {
            Content::Bytes(bytes) => Cow::Borrowed(bytes),
            Content::Ones => Cow::Owned(bf16::ONE.to_le_bytes().repeat(self.bytes() / 2)),
            Content::Zeros => Cow::Owned(vec![0; self.bytes()]),
            Content::Normal => {
                let cols = self.shape[1];
                let deviation = (1.0 / cols as f32).sqrt();
                let mut bytes = vec![0; self.bytes()];
                bytes.par_chunks_mut(2 * cols).enumerate().for_each(|(row, bytes)| {
                    normal_row(bytes, deviation, (seed << 32) | row as u64);
                });
                Cow::Owned(bytes)
            }
        }
    }
}

/// Fills a row with normal numbers: Box and Muller's transform of a splitmix sequence.
fn normal_row(bytes: &mut [u8], deviation: f32, seed: u64) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut uniform = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        // In (0, 1): the logarithm below stays finite.
        (((z ^ (z >> 31)) >> 41) as f32 + 0.5) / (1u32 << 23) as f32
    };
    for pair in bytes.chunks_mut(4) {
        let radius = deviation * (-2.0 * uniform().ln()).sqrt();
        let (sin, cos) = (std::f32::consts::TAU * uniform()).sin_cos();
        for (bytes, value) in pair.chunks_mut(2).zip([radius * cos, radius * sin]) {
            bytes.copy_from_slice(&bf16::from_f32(value).to_le_bytes());
        }
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    println!("{}: {:.2} GB", arguments.out.display(), write(&arguments)? as f64 / 1e9);
    Ok(())
}

/// Writes the checkpoint; returns the bytes of its tensors.
pub fn write(arguments: &Arguments) -> Result<usize> {
    let Arguments { out, small, .. } = arguments;
    let &Arguments { hidden, intermediate, heads, kv_heads, blocks, .. } = arguments;
    ensure!(
        hidden.is_multiple_of(heads) && (hidden / heads).is_multiple_of(16),
        "heads of a multiple of 16 are needed"
    );
    let head_dim = hidden / heads;
    let mut config: Value = serde_json::from_slice(&fs::read(small.join("config.json"))?)?;
    let text = config["text_config"].as_object_mut().context("text_config is missing")?;
    for (key, value) in [
        ("hidden_size", hidden),
        ("intermediate_size", intermediate),
        ("num_hidden_layers", blocks),
        ("num_attention_heads", heads),
        ("num_key_value_heads", kv_heads),
        ("head_dim", head_dim),
    ] {
        text.insert(key.into(), value.into());
    }
    text.insert("layer_types".into(), vec!["full_attention"; blocks].into());
    text["rope_parameters"]["mrope_section"] = json!([head_dim / 8, head_dim * 3 / 16, head_dim * 3 / 16]);
    let vocab = text["vocab_size"].as_u64().context("vocab_size is missing")? as usize;
    config["vision_config"]["hidden_size"] = hidden.into();

    let weights = fs::read(small.join("model.safetensors"))?;
    let weights = SafeTensors::deserialize(&weights)?;
    let mut tensors = Vec::new();
    let mut add = |name: &str, shape: &[usize], content| {
        tensors.push(Tensor { name: name.into(), shape: shape.to_vec(), content });
    };
    for (name, view) in weights.iter().filter(|(name, _)| name.starts_with("visual.")) {
        match name {
            "visual.merger.mlp.2.weight" => add(name, &[hidden, view.shape()[1]], Content::Normal),
            "visual.merger.mlp.2.bias" => add(name, &[hidden], Content::Zeros),
            _ => add(name, view.shape(), Content::Bytes(view.data())),
        }
    }
    for block in 0..blocks {
        let at = format!("model.layers.{block}");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            add(&format!("{at}.{norm}.weight"), &[hidden], Content::Ones);
        }
        for (name, rows) in [("q", hidden), ("k", kv_heads * head_dim), ("v", kv_heads * head_dim)] {
            add(&format!("{at}.self_attn.{name}_proj.weight"), &[rows, hidden], Content::Normal);
            add(&format!("{at}.self_attn.{name}_proj.bias"), &[rows], Content::Zeros);
        }
        add(&format!("{at}.self_attn.o_proj.weight"), &[hidden, hidden], Content::Normal);
        for (name, shape) in
            [("gate", [intermediate, hidden]), ("up", [intermediate, hidden]), ("down", [hidden, intermediate])]
        {
            add(&format!("{at}.mlp.{name}_proj.weight"), &shape, Content::Normal);
        }
    }
    add("model.norm.weight", &[hidden], Content::Ones);
    add("model.embed_tokens.weight", &[vocab, hidden], Content::Normal);
    add("lm_head.weight", &[vocab, hidden], Content::Normal);

    fs::create_dir(out).with_context(|| format!("cannot create {}", out.display()))?;
    for entry in fs::read_dir(small)? {
        let entry = entry?;
        if entry.file_name() != "config.json" && entry.file_name() != "model.safetensors" {
            fs::copy(entry.path(), out.join(entry.file_name()))?;
        }
    }
    fs::write(out.join("config.json"), serde_json::to_vec_pretty(&config)?)?;
    let (mut header, mut end) = (Map::new(), 0);
    for tensor in &tensors {
        let offsets = [end, end + tensor.bytes()];
        header.insert(tensor.name.clone(), json!({"dtype": "BF16", "shape": tensor.shape, "data_offsets": offsets}));
        end = offsets[1];
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::new(File::create(out.join("model.safetensors"))?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    for (seed, tensor) in tensors.iter().enumerate() {
        match tensor.content {
            Content::Normal if arguments.sparse => {
                file.seek(SeekFrom::Current(tensor.bytes() as i64))?;
            }
            _ => file.write_all(&tensor.data(seed as u64 + 1))?,
        }
    }
    let length = file.stream_position()?;
    file.into_inner()?.set_len(length)?;
    Ok(end)
}
