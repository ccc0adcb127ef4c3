//! Saving and restoring while a run lives.

use super::{Found, REPORTS, State, Unusable, recycle_all_but, spare};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::checksum::{of_range, of_range_until};
use crate::checkpoint::own::{self, Foreign};
use crate::checkpoint::sealed::{self, Sealed};
use crate::checkpoint::work::{Kept, WorkFolder, sync_folder};
use crate::checkpoint::write::Writer;
use crate::device::ModelOps;
use crate::model::decoder::DeepStack;
use crate::model::language_model::{Positions, image_rows};
use crate::parallel::try_map;
use crate::progress::Stop;
use crate::quantize::block::Activations;
use crate::quantize::block::{Chunk, needs_float_path};
use crate::run::input::Input;
use crate::run::places::Chunked;
use anyhow::{Context, Error, Result, anyhow};
use safetensors::Dtype;
use std::collections::HashSet;
use std::fs;

/// A run's dealings with its work folder while it lives.
pub(in crate::run) struct Session<'a, D: ModelOps> {
    pub(in crate::run) device: &'a D,
    pub(in crate::run) input: &'a Input,
    pub(in crate::run) work: &'a WorkFolder,
    pub(in crate::run) activations: Activations,
}

impl<D: ModelOps> Session<'_, D> {
    /// Saves image features for later blocks.
    pub(in crate::run) fn save_levels(&self, chunks: &mut [Chunk<D::Tensor>]) -> Result<()> {
        let float = self.device.element_type();
        let mut specs = Vec::new();
        let mut places = Vec::new();
        for (i, chunk) in chunks.iter().enumerate() {
            for (level, features) in chunk.layout.deepstack.iter().flat_map(|d| &d.levels).enumerate() {
                specs.push(sealed::matrix_spec(level_name(i, level), float, self.device.shape(features)));
                places.push((i, level));
            }
        }
        if specs.is_empty() {
            return Ok(());
        }
        let path = self.work.place(Kept::Levels);
        let write = || {
            sealed::write(own::open_or_create(&path)?, specs, |n| {
                let (i, level) = places[n];
                let deepstack = chunks[i].layout.deepstack.as_mut().context("features that were there")?;
                self.bytes(&mut deepstack.levels[level])
            })
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }

    /// Saves a state, `chunks` being what comes out of its last block; none are needed behind the last of all. Whoever calls
    /// has brought the finished tensors to the disk.
    pub(in crate::run) fn save(&self, state: &State, chunks: &mut [Chunk<D::Tensor>]) -> Result<()> {
        let float = self.device.element_type();
        let mut specs = Vec::new();
        let mut places = Vec::new();
        for (i, chunk) in chunks.iter().enumerate() {
            for (way, x) in [(Way::Quantized, Some(&chunk.x_quantized)), (Way::Float, chunk.x_float.as_ref())] {
                if let Some(x) = x {
                    specs.push(sealed::matrix_spec(way.name(i), float, self.device.shape(x)));
                    places.push((i, way));
                }
            }
        }
        // Unlike JSON it knows infinities, which a layer's error may be.
        let mut reports = Vec::new();
        ciborium::into_writer(state, &mut reports)?;
        specs.push(sealed::spec(REPORTS.into(), Dtype::U8, vec![reports.len()]));
        let finished = state.finished();
        let (path, spare) = (self.work.place(Kept::State(finished)), spare(self.work));
        let write = || {
            sealed::write(own::open_or_create(&spare)?, specs, |n| match places.get(n) {
                Some(&(i, Way::Quantized)) => self.bytes(&mut chunks[i].x_quantized),
                Some(&(i, Way::Float)) => self.bytes(chunks[i].x_float.as_mut().context("a stream that was there")?),
                None => Ok(reports.clone()),
            })?;
            fs::rename(&spare, &path)?;
            sync_folder(self.work.path())
        };
        write().with_context(|| format!("cannot write {}", path.display()))?;
        recycle_all_but(self.work, finished)
    }

    /// What a tensor holds, from wherever it is, one copy at a time.
    fn bytes(&self, x: &mut D::Tensor) -> Result<Vec<u8>> {
        self.device.fetch(x)?;
        let values = self.device.download(x)?;
        if self.activations == Activations::Streamed {
            self.device.park(x)?;
        }
        Ok(sealed::bytes_of(self.device.element_type(), &values))
    }

    /// The samples, packed, as a state has them.
    pub(in crate::run) fn restore(
        &self,
        found: Found,
        packed: &Chunked<'_>,
        stop: &Stop,
    ) -> Result<Vec<Chunk<D::Tensor>>> {
        let (device, config, input) = (self.device, &self.input.config, self.input);
        let levels = self.work.place(Kept::Levels);
        let levels = (input.levels() > 0).then(|| Sealed::open(levels)).transpose().context(Unusable)?;
        let positions = Positions::new(&config.decoder);
        let float = device.element_type();
        let all = needs_float_path(&input.solver, input.importance, input.refit);
        let mut chunks = Vec::with_capacity(packed.chunks.len());
        for (i, sequences) in packed.chunks.iter().enumerate() {
            stop.check()?;
            let mut layout = positions.layout(device, sequences)?;
            let rows = image_rows(sequences, config.image_token);
            if let Some(levels) = levels.as_ref().filter(|_| !rows.is_empty()) {
                let shape = (rows.len(), config.decoder.hidden);
                let read =
                    |level| device.upload_model(levels.matrix(&level_name(i, level), float, shape).context(Unusable)?);
                layout.deepstack =
                    Some(DeepStack { rows, levels: (0..input.levels()).map(read).collect::<Result<_>>()? });
            }
            let shape = (sequences.iter().map(|s| s.tokens.len()).sum(), config.decoder.hidden);
            let read = |way: Way| device.upload_model(found.file.matrix(&way.name(i), float, shape).context(Unusable)?);
            let x_float = (all || packed.is_checked(i)).then(|| read(Way::Float)).transpose()?;
            let mut chunk = Chunk::of(sequences, config.image_token, layout, read(Way::Quantized)?, x_float);
            chunk.held_out = packed.is_held_out(i);
            if self.activations == Activations::Streamed {
                chunk.park(device)?;
            }
            chunks.push(chunk);
        }
        Ok(chunks)
    }
}

/// The two ways through the decoder.
#[derive(Clone, Copy)]
enum Way {
    Quantized,
    Float,
}

impl Way {
    fn name(self, chunk: usize) -> String {
        match self {
            Self::Quantized => format!("{chunk}.quantized"),
            Self::Float => format!("{chunk}.float"),
        }
    }
}

fn level_name(chunk: usize, level: usize) -> String {
    format!("{chunk}.level.{level}")
}

impl State {
    /// Adds the checksums of a block's layers, which `writer` has written to `grown`.
    pub(in crate::run) fn add_checksums(&mut self, block: usize, writer: &Writer, grown: &Checkpoint) -> Result<()> {
        let layers = self.done.layers.iter().filter(|layer| layer.block == block);
        let names: Vec<String> = layers.flat_map(|layer| writer.tensors_of(&layer.name)).collect();
        let sums = try_map(names.len(), |i| {
            let (file, range) = grown.place(&names[i])?;
            of_range(file, range)
        })?;
        self.checksums.extend(names.into_iter().zip(sums));
        Ok(())
    }
}

/// Goes on with the growing checkpoint, whose tensors must be what they were when the state was saved.
pub(in crate::run) fn reopen(mut writer: Writer, input: &Input, state: &State, stop: &Stop) -> Result<Writer> {
    let source = &input.checkpoint;
    let replaced: HashSet<String> = input.linears.iter().map(|linear| format!("{}.weight", linear.module)).collect();
    let written =
        |name: &str| state.checksums.contains_key(name) || (source.contains(name) && !replaced.contains(name));
    let unusable = |error: Error| if error.is::<Foreign>() { error } else { error.context(Unusable) };
    writer.go_on(written).map_err(unusable)?;
    // First: a process may have been killed while it wrote them.
    writer.write_side_files(source, &input.linears)?;
    let grown = Checkpoint::open(writer.folder()).context(Unusable)?;
    let names: Vec<&str> = grown.names().filter(|name| written(name)).collect();
    let sum = |checkpoint: &Checkpoint, name| {
        let (file, range) = checkpoint.place(name)?;
        of_range_until(file, range, &|| Ok(stop.check()?))
    };
    try_map(names.len(), |i| {
        let name = names[i];
        let found = sum(&grown, name)?;
        let same = match state.checksums.get(name) {
            Some(sum) => found == *sum,
            None => found == sum(source, name)?,
        };
        match same {
            true => Ok(()),
            false => Err(anyhow!("{} is damaged at tensor {name}", grown.file_of(name)).context(Unusable)),
        }
    })?;
    Ok(writer)
}
