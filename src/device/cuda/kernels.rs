//! The functions of the C API, from the kernels in this program or from a library built elsewhere.
#![allow(unsafe_code)]

use super::bindings::{self, vlmq_status, vlmq_stream};
use anyhow::{Context, Result};
use libloading::Library;
use std::ffi::{CStr, c_char, c_void};
use std::path::Path;

/// Enqueues a call.
type Enqueue<A> = unsafe extern "C" fn(*const A, vlmq_stream) -> vlmq_status;
/// Bytes of work space that a call needs.
type WorkspaceBytes<A> = unsafe extern "C" fn(*const A) -> usize;

/// Text of the library's, or null.
type Text = unsafe extern "C" fn() -> *const c_char;

/// The arguments of one function of the C API.
pub(super) trait Arguments {
    /// The function's name in vlmq.h.
    const NAME: &'static str;
    /// The function.
    fn function(kernels: &Kernels) -> Enqueue<Self>;
}

/// Arguments with a work space.
pub(super) trait NeedsWorkspace: Arguments {
    /// The query for its size.
    fn query(kernels: &Kernels) -> WorkspaceBytes<Self>;
    /// Hands it over.
    fn set_workspace(&mut self, workspace: *mut c_void, bytes: usize);
}

macro_rules! kernels {
    ($($name:ident($arguments:ident) $(workspace $query:ident)?;)*) => {
        /// Every function of the C API.
        pub(super) struct Kernels {
            $($name: Enqueue<bindings::$arguments>, $($query: WorkspaceBytes<bindings::$arguments>,)?)*
            vlmq_last_error: Text,
            /// The emulator's alone.
            vlmq_emulator_synchronize: Option<Text>,
            /// Keeps the functions where they are; none where they are part of this program.
            _library: Option<Library>,
        }

        impl Kernels {
            /// The kernels of this program.
            #[cfg(vlmq_kernels)]
            pub(super) fn linked() -> Result<Self> {
                Ok(Self {
                    $($name: bindings::$name, $($query: bindings::$query,)?)*
                    vlmq_last_error: bindings::vlmq_last_error,
                    vlmq_emulator_synchronize: None,
                    _library: None,
                })
            }

            fn find(library: Library) -> Result<Self, libloading::Error> {
                // SAFETY: each name is looked up with the signature that bindgen read off vlmq.h, and the library stays
                // open for as long as the functions.
                unsafe {
                    Ok(Self {
                        $($name: *library.get(stringify!($name))?, $($query: *library.get(stringify!($query))?,)?)*
                        vlmq_last_error: *library.get("vlmq_last_error")?,
                        vlmq_emulator_synchronize: library.get("vlmq_emulator_synchronize").ok().map(|found| *found),
                        _library: Some(library),
                    })
                }
            }
        }

        $(impl Arguments for bindings::$arguments {
            const NAME: &'static str = stringify!($name);
            fn function(kernels: &Kernels) -> Enqueue<Self> {
                kernels.$name
            }
        }
        $(impl NeedsWorkspace for bindings::$arguments {
            fn query(kernels: &Kernels) -> WorkspaceBytes<Self> {
                kernels.$query
            }
            fn set_workspace(&mut self, workspace: *mut c_void, bytes: usize) {
                self.workspace = workspace;
                self.workspace_bytes = bytes;
            }
        })?)*
    };
}

kernels! {
    vlmq_weighted_hessian(vlmq_weighted_hessian_args) workspace vlmq_weighted_hessian_workspace_bytes;
    vlmq_permute(vlmq_permute_args);
    vlmq_product(vlmq_product_args);
    vlmq_factor(vlmq_factor_args) workspace vlmq_factor_workspace_bytes;
    vlmq_cross_factor(vlmq_cross_factor_args) workspace vlmq_cross_factor_workspace_bytes;
    vlmq_cholesky_inverse(vlmq_cholesky_inverse_args) workspace vlmq_cholesky_inverse_workspace_bytes;
    vlmq_squared_norm(vlmq_squared_norm_args) workspace vlmq_squared_norm_workspace_bytes;
    vlmq_permute_columns(vlmq_permute_columns_args);
    vlmq_quantize_block(vlmq_quantize_block_args);
    vlmq_group_grid(vlmq_group_grid_args) workspace vlmq_group_grid_workspace_bytes;
    vlmq_pack(vlmq_pack_args);
    vlmq_unpack(vlmq_unpack_args);
    vlmq_dequantize(vlmq_dequantize_args);
    vlmq_norm(vlmq_norm_args);
    vlmq_norm_backward(vlmq_norm_backward_args);
    vlmq_rotate(vlmq_rotate_args);
    vlmq_attention(vlmq_attention_args);
    vlmq_attention_backward(vlmq_attention_backward_args) workspace vlmq_attention_backward_workspace_bytes;
    vlmq_activate(vlmq_activate_args);
    vlmq_add(vlmq_add_args);
    vlmq_gather_rows(vlmq_gather_rows_args);
    vlmq_mean_abs_rows(vlmq_mean_abs_rows_args);
    vlmq_scaled_squares_rows(vlmq_scaled_squares_rows_args);
    vlmq_first_non_finite_row(vlmq_first_non_finite_row_args);
    vlmq_convert(vlmq_convert_args);
}

impl Kernels {
    /// Says how to get them: this program has none.
    #[cfg(not(vlmq_kernels))]
    pub(super) fn linked() -> Result<Self> {
        anyhow::bail!(
            "this program was built without CUDA kernels; build it again with a CUDA toolkit from 13.0 on: \
             VLMQ_CUDA=require cargo build --release says what it misses"
        )
    }

    /// The kernels of a library, which must hold all.
    pub(super) fn load(path: &Path) -> Result<Self> {
        // SAFETY: whoever names a library of kernels vouches for what it runs when it is opened, as for any program.
        let library = unsafe { Library::new(path) }.with_context(|| format!("{}: cannot be opened", path.display()))?;
        Self::find(library).with_context(|| format!("{}: not the kernels of this version", path.display()))
    }
    /// What the calling thread's last call says that failed, beginning with the call's name.
    pub(super) fn last_error(&self) -> String {
        // SAFETY: the text is terminated, and stays the same until this thread calls again.
        unsafe { CStr::from_ptr((self.vlmq_last_error)()) }.to_string_lossy().into_owned()
    }

    /// The error that an emulated kernel has raised while it ran, if any.
    pub(super) fn late_error(&self) -> Option<String> {
        // SAFETY: kernels/emulator/runtime.cpp defines it so.
        let text = unsafe { self.vlmq_emulator_synchronize?() };
        // SAFETY: static text of the library, which is open, where there is any.
        (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
    }
}
