//! Saving and restoring while a run lives.

use super::{Found, State, Unusable};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::checksum::{Check, of_range_until};
use crate::checkpoint::own::Foreign;
use crate::checkpoint::sealed::{Sealed, Sealing};
use crate::checkpoint::work::{Kept, WorkFolder};
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
use crate::tensor::StoredMatrix;
use anyhow::{Context, Error, Result, anyhow};
use std::collections::BTreeMap;

/// A run's dealings with its work folder while it lives.
pub(in crate::run) struct Session<'a, D: ModelOps> {
    pub(in crate::run) device: &'a D,
    pub(in crate::run) input: &'a Input,
    pub(in crate::run) work: &'a WorkFolder,
    pub(in crate::run) activations: Activations,
}

impl<D: ModelOps> Session<'_, D> {
    /// What the next state saves of `chunks`, which have `finished` blocks behind them: borrowed where their memory is the host's, else a
    /// copy. Image features for later blocks are left out where they `are_saved`.
    pub(in crate::run) fn streams<'c>(
        &self,
        chunks: &'c [Chunk<D::Tensor>],
        finished: usize,
        are_saved: bool,
    ) -> Result<Streams<'c>> {
        let mut streams = Streams::default();
        let matrix = |name: String, x: &'c D::Tensor| -> Result<Sealing<'c>> {
            let (float, shape) = (self.device.element_type(), self.device.shape(x));
            Ok(Sealing::matrix(name, float, shape, self.device.bytes(x)?))
        };
        for (i, chunk) in chunks.iter().enumerate() {
            let levels = chunk.layout.deepstack.iter().flat_map(|deepstack| &deepstack.levels).enumerate();
            if !are_saved && needs_levels(self.input, finished) {
                for (level, features) in levels {
                    streams.levels.push(matrix(level_name(i, level), features)?);
                }
            }
            for (way, x) in [(Way::Quantized, Some(&chunk.x_quantized)), (Way::Float, chunk.x_float.as_ref())] {
                if let Some(x) = x {
                    streams.residual.push(matrix(way.name(i), x)?);
                }
            }
        }
        Ok(streams)
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
        let levels =
            needs_levels(input, found.state.finished()).then(|| Sealed::open(levels)).transpose().context(Unusable)?;
        let positions = Positions::new(&config.decoder);
        let all = needs_float_path(&input.solver, input.importance, input.refit);
        let mut chunks = Vec::with_capacity(packed.chunks.len());
        for (i, sequences) in packed.chunks.iter().enumerate() {
            stop.check()?;
            let mut layout = positions.layout(device, sequences)?;
            let rows = image_rows(sequences, config.image_token);
            if let Some(levels) = levels.as_ref().filter(|_| !rows.is_empty()) {
                let shape = (rows.len(), config.decoder.hidden);
                let read = |level| self.upload(levels, &level_name(i, level), shape);
                layout.deepstack =
                    Some(DeepStack { rows, levels: (0..input.levels()).map(read).collect::<Result<_>>()? });
            }
            let shape = (sequences.iter().map(|s| s.tokens.len()).sum(), config.decoder.hidden);
            let read = |way: Way| self.upload(&found.file, &way.name(i), shape);
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

    /// A matrix of activations as the device holds them.
    fn upload(&self, file: &Sealed, name: &str, (rows, cols): (usize, usize)) -> Result<D::Tensor> {
        let float = self.device.element_type();
        let bytes = file.matrix(name, float, (rows, cols)).context(Unusable)?;
        self.device.upload_stored(StoredMatrix::new(float, rows, cols, &bytes)?)
    }
}

/// Whether image features are still to be added behind so many blocks.
fn needs_levels(input: &Input, finished: usize) -> bool {
    finished < input.levels()
}

/// What a state holds of the chunks.
#[derive(Default)]
pub(in crate::run) struct Streams<'c> {
    /// Image features for later blocks, which have a file of their own; none where that is written.
    pub(super) levels: Vec<Sealing<'c>>,
    /// Both paths' residual streams.
    pub(super) residual: Vec<Sealing<'c>>,
}

impl Streams<'_> {
    /// These streams with bytes of their own.
    pub(in crate::run) fn into_owned(self) -> Streams<'static> {
        let own = |all: Vec<Sealing<'_>>| all.into_iter().map(Sealing::into_owned).collect();
        Streams { levels: own(self.levels), residual: own(self.residual) }
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

/// Goes on with the growing checkpoint, whose tensors must be what they were when the state was saved: those of finished layers by their
/// checksums there, those that were copied by the `kept` ones'. Reads as long as `check` lets it.
pub(in crate::run) fn reopen(
    mut writer: Writer,
    input: &Input,
    state: &State,
    kept: &BTreeMap<String, String>,
    check: Check<'_>,
) -> Result<Writer> {
    let source = &input.checkpoint;
    let expected = |name: &str| state.checksums.get(name).or_else(|| kept.get(name));
    let unusable = |error: Error| if error.is::<Foreign>() { error } else { error.context(Unusable) };
    writer.go_on(|name| expected(name).is_some()).map_err(unusable)?;
    // First: a process may have been killed while it wrote them.
    writer.write_side_files(source, &input.linears)?;
    let grown = Checkpoint::open(writer.folder()).context(Unusable)?;
    let names: Vec<(&str, &String)> = grown.names().filter_map(|name| Some((name, expected(name)?))).collect();
    try_map(names.len(), |i| {
        let (name, expected) = names[i];
        let (file, range) = grown.place(name)?;
        match of_range_until(file, range, check)? == *expected {
            true => Ok(()),
            false => Err(anyhow!("{} is damaged at tensor {name}", grown.file_of(name)).context(Unusable)),
        }
    })?;
    Ok(writer)
}
