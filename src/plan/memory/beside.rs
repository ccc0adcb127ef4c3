//! What the host holds of the work that it does beside its device: layers on their way to the file, the next block's weights on theirs to
//! the device, and the state that is being saved.

use crate::checkpoint::formats::LinearSpec;
use crate::device::ModelOps;
use crate::device::counting::Counting;
use crate::model::decoder::Projection;
use crate::plan::{Entry, F32, StateBytes, Subject, entry};
use crate::tensor::Float;

/// Layers that wait to be written, at most, beside one that is being written.
pub const WAITING: usize = 1;

/// The parts, of weights that are `stored` in this type.
pub(super) fn entries(subject: &Subject<'_>, device: &Counting, stored: Float) -> [Entry; 3] {
    let layout = subject.solver.layout();
    let (mut codes, mut encoded, mut weight) = (0, 0, 0);
    for projection in Projection::ALL {
        let (out_features, in_features) = projection.shape(&subject.config.decoder);
        let (values, groups) = (out_features * in_features, in_features.div_ceil(layout.group_columns(in_features)));
        // A scale in float32 and a zero a group.
        codes = codes.max(values as u64 + (out_features * groups) as u64 * (F32 + 1));
        let linear = LinearSpec { module: String::new(), out_features, in_features };
        let tensors = subject.format.specs(&linear, &layout);
        encoded = encoded.max(tensors.iter().map(|tensor| tensor.bytes() as u64).sum());
        weight = weight.max(device.loading_bytes(values as u64, (values * stored.bytes()) as u64));
    }
    let StateBytes { state, levels } = StateBytes::of(subject, device.element_bytes());
    [
        entry("layers on their way to the file", (WAITING as u64 + 1) * codes + encoded),
        entry("the next block's largest weight on its way", weight),
        entry("a copy of the state while it is saved", state + levels),
    ]
}
