//! cuBLAS: where it is found, which version will do, and the plain products.
//!
//! The library is opened here and called through its own symbols. By name alone the loader would give whatever comes first on
//! its path: `libcublas.so` of another CUDA version, or a stub that only linkers can use.
#![allow(unsafe_code)]

use super::runtime::Product;
use crate::tensor::Float;
use anyhow::{Context, Result, anyhow, bail, ensure};
use cudarc::driver::{CudaContext, CudaStream, result as driver};
use libloading::Library;
use std::ffi::{CStr, OsString, c_char, c_int, c_void};
use std::fmt;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::Arc;

/// The file that NVIDIA installs.
const FILE: &str = "libcublas.so.13";

/// The library that cuBLAS needs beside it.
const COMPANION: &str = "libcublasLt.so.13";

/// The major version whose products are tested.
const MAJOR: c_int = 13;

/// Names a file or a folder, for a cuBLAS that lies elsewhere.
const VARIABLE: &str = "VLMQ_CUBLAS";

/// Work space of the products, as much as cuBLAS would take for itself on the largest GPUs. Which algorithm it picks depends
/// on it, so that it is the same everywhere, and counted.
pub(super) const WORKSPACE_BYTES: usize = 32 << 20;

type Handle = *mut c_void;
type Status = c_int;

// Of cublas_api.h and library_types.h; other numbers of an enum are an error of cuBLAS's own.
const SUCCESS: Status = 0;
const OP_N: c_int = 0;
const OP_T: c_int = 1;
const CUDA_R_32F: c_int = 0;
const CUDA_R_16F: c_int = 2;
const CUDA_R_16BF: c_int = 14;
const COMPUTE_32F: c_int = 68;
const GEMM_DEFAULT: c_int = -1;
const MATH_DISALLOW_REDUCED_PRECISION_REDUCTION: c_int = 16;

macro_rules! functions {
    ($($field:ident: $symbol:literal fn($($argument:ty),*) -> $result:ty;)*) => {
        /// What is called of cuBLAS.
        struct Functions {
            $($field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Functions {
            fn find(library: &Library) -> Result<Self, libloading::Error> {
                // SAFETY: the signatures are those of cublas_api.h of CUDA 13, an enum being an int. Whoever keeps them keeps
                // the library open.
                unsafe { Ok(Self { $($field: *library.get($symbol)?,)* }) }
            }
        }
    };
}

functions! {
    create: "cublasCreate_v2" fn(*mut Handle) -> Status;
    destroy: "cublasDestroy_v2" fn(Handle) -> Status;
    set_stream: "cublasSetStream_v2" fn(Handle, *mut c_void) -> Status;
    set_math_mode: "cublasSetMathMode" fn(Handle, c_int) -> Status;
    set_workspace: "cublasSetWorkspace_v2" fn(Handle, *mut c_void, usize) -> Status;
    status_name: "cublasGetStatusName" fn(Status) -> *const c_char;
    gemm: "cublasGemmEx" fn(
        Handle, c_int, c_int, c_int, c_int, c_int, *const c_void, *const c_void, c_int, c_int, *const c_void, c_int, c_int,
        *const c_void, *mut c_void, c_int, c_int, c_int, c_int
    ) -> Status;
}

impl Functions {
    fn check(&self, status: Status) -> Result<()> {
        if status == SUCCESS {
            return Ok(());
        }
        // SAFETY: takes any number; what it returns is static text of the library, which stays open.
        let name = unsafe { CStr::from_ptr((self.status_name)(status)) };
        bail!("{} ({status})", name.to_string_lossy())
    }
}

/// Major, minor and patch level, as the library says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Version([c_int; 3]);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [major, minor, patch] = self.0;
        write!(f, "{major}.{minor}.{patch}")
    }
}

/// The library, open.
pub(super) struct Cublas {
    functions: Functions,
    version: Version,
    /// Never closed: cuBLAS leaves hooks in the driver.
    _library: ManuallyDrop<Library>,
}

impl Cublas {
    /// The library that the environment, the loader or a toolkit has. Errors with every place where there is none of the right
    /// version, and with the named one where it is not.
    pub(super) fn find(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        if let Some(named) = variable(VARIABLE).filter(|named| !named.is_empty()) {
            let named = PathBuf::from(named);
            let file = if named.is_dir() { named.join(FILE) } else { named.clone() };
            return Self::open(&file)
                .map_err(|why| anyhow!("{VARIABLE}={}: {}: {why:#}", named.display(), file.display()));
        }
        Self::first_of(&places(variable))
    }

    fn first_of(places: &[PathBuf]) -> Result<Self> {
        let mut seen = Vec::new();
        for place in places {
            match Self::open(place) {
                Ok(found) => return Ok(found),
                Err(why) => seen.push(format!("{} ({why:#})", place.display())),
            }
        }
        bail!(
            "cuBLAS {MAJOR} is not found in {}. Install the libraries of CUDA {MAJOR}, or name {FILE} or its folder in {VARIABLE}",
            seen.join(", ")
        )
    }

    /// A bare file name is the loader's to find.
    fn open(file: &Path) -> Result<Self> {
        if file.components().count() > 1 {
            let whole = file.canonicalize().map_err(|_| anyhow!("not there"))?;
            ensure!(whole.components().all(|part| part.as_os_str() != "stubs"), "a stub, for linkers only");
            // Known to the loader by its name from then on. Where that fails, so does the next, and says why.
            if let Some(companion) = whole.parent().map(|folder| folder.join(COMPANION)).filter(|file| file.exists()) {
                let _ = load(&companion).map(ManuallyDrop::new);
            }
        }
        let library = load(file)?;
        let version = version(&library)?;
        ensure!(version.0[0] == MAJOR, "cuBLAS {version}, where {MAJOR} is needed");
        let functions = Functions::find(&library).with_context(|| format!("cuBLAS {version} without a function"))?;
        Ok(Self { functions, version, _library: ManuallyDrop::new(library) })
    }
}

/// Where cuBLAS may lie, the likeliest first: the loader's own path, then toolkits. Never by the name without a version.
fn places(variable: impl Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let mut places = vec![PathBuf::from(FILE)];
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable).filter(|top| !top.is_empty());
    places.extend(toolkits.map(|top| Path::new(&top).join("lib64").join(FILE)));
    let target = format!("targets/{}-linux/lib", std::env::consts::ARCH.replace("aarch64", "sbsa"));
    places.extend(["lib64", &target].map(|folder| Path::new("/usr/local/cuda").join(folder).join(FILE)));
    places
}

/// Opens a library with all that it needs, so that what is missing shows now.
fn load(file: &Path) -> Result<Library, libloading::Error> {
    // SAFETY: a library of NVIDIA's, or one that the user names; its initializers are meant to run in any program.
    #[cfg(unix)]
    unsafe {
        use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
        Library::open(Some(file), RTLD_NOW | RTLD_LOCAL).map(Into::into)
    }
    // SAFETY: as above.
    #[cfg(not(unix))]
    unsafe {
        Library::new(file)
    }
}

fn version(library: &Library) -> Result<Version> {
    let mut version = Version::default();
    // SAFETY: the signature is that of cublas_api.h in every version, an enum being an int.
    let property = unsafe { library.get::<unsafe extern "C" fn(c_int, *mut c_int) -> Status>("cublasGetProperty") };
    let property = property.context("no cuBLAS")?;
    for (kind, number) in version.0.iter_mut().enumerate() {
        // SAFETY: writes one number.
        let status = unsafe { property(kind as c_int, number) };
        ensure!(status == SUCCESS, "no cuBLAS: it does not tell its version (status {status})");
    }
    Ok(version)
}

/// A handle with its work space, for one stream. It serves one thread at a time.
pub(super) struct Blas {
    cublas: Cublas,
    handle: Handle,
    workspace: u64,
    context: Arc<CudaContext>,
}

// SAFETY: a handle may move between threads; the mutex around it lets one use it at a time.
unsafe impl Send for Blas {}

impl Blas {
    /// A handle for products enqueued on `stream`, which must outlive it. The context is the calling thread's.
    pub(super) fn new(cublas: Cublas, context: &Arc<CudaContext>, stream: &CudaStream) -> Result<Self> {
        let mut blas = Self { cublas, handle: ptr::null_mut(), workspace: 0, context: context.clone() };
        let functions = &blas.cublas.functions;
        // SAFETY: handle, stream and work space are live, and the driver's stream type is the runtime's under another name.
        unsafe {
            functions.check((functions.create)(&mut blas.handle)).context("cuBLAS does not start")?;
            blas.workspace = driver::malloc_sync(WORKSPACE_BYTES).context("no memory for cuBLAS's work space")?;
            functions.check((functions.set_stream)(blas.handle, stream.cu_stream().cast())).context("cuBLAS")?;
            // After the stream, which sets the library's own work space again.
            let workspace = blas.workspace as *mut c_void;
            functions.check((functions.set_workspace)(blas.handle, workspace, WORKSPACE_BYTES)).context("cuBLAS")?;
            // Sums of split products stay in float32.
            let mode = MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
            functions.check((functions.set_math_mode)(blas.handle, mode)).context("cuBLAS")?;
        }
        Ok(blas)
    }

    pub(super) fn version(&self) -> Version {
        self.cublas.version
    }

    /// Enqueues a product, for a thread that has the context.
    ///
    /// # Safety
    /// As [`Runtime::product`](super::runtime::Runtime::product).
    pub(super) unsafe fn product(&self, product: &Product) -> Result<()> {
        let int = |size: usize| c_int::try_from(size).context("a matrix of more than 2^31 rows or columns");
        let (rows, cols, inner) = (int(product.rows)?, int(product.cols)?, int(product.inner)?);
        let kind = |precision| match precision {
            Float::F32 => CUDA_R_32F,
            Float::Bf16 => CUDA_R_16BF,
            Float::F16 => CUDA_R_16F,
        };
        let (from, to) = (kind(product.precision), kind(product.rounded_to));
        let (alpha, beta) = (1.0f32, 0.0f32);
        // cuBLAS counts column by column, where a row-major matrix is its transpose: cᵀ = op(b)ᵀ·aᵀ.
        let (operation, b_stride) = if product.transposed { (OP_T, inner) } else { (OP_N, cols) };
        // SAFETY: the caller's promise; alpha and beta are host memory that is read before the call returns.
        let status = unsafe {
            (self.cublas.functions.gemm)(
                self.handle,
                operation,
                OP_N,
                cols,
                rows,
                inner,
                (&raw const alpha).cast(),
                product.b as *const c_void,
                from,
                b_stride,
                product.a as *const c_void,
                from,
                inner,
                (&raw const beta).cast(),
                product.c as *mut c_void,
                to,
                cols,
                COMPUTE_32F,
                GEMM_DEFAULT,
            )
        };
        self.cublas.functions.check(status).with_context(|| format!("cuBLAS: {product}"))
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // A context that is lost has taken both with it.
        if self.context.bind_to_thread().is_err() {
            return;
        }
        // SAFETY: the handle is live where there is one, and dropped once; waits for the work that uses the space. An error at
        // the end has nobody to hear it.
        unsafe {
            if !self.handle.is_null() {
                let _ = (self.cublas.functions.destroy)(self.handle);
            }
            if self.workspace != 0 {
                let _ = driver::free_sync(self.workspace);
            }
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::{Cublas, FILE, places};
    use std::ffi::OsString;
    use std::fs;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    /// A library that says it is cuBLAS of a version, with the symbols of `names`.
    fn fake(folder: &Path, version: [i32; 3], names: &[&str]) -> PathBuf {
        fs::create_dir_all(folder).unwrap();
        let (source, library) = (folder.join("fake.c"), folder.join(FILE));
        let [major, minor, patch] = version;
        let mut text = format!(
            "int cublasGetProperty(int kind, int* value) {{\n  const int all[] = {{{major}, {minor}, {patch}}};\n  \
             *value = all[kind];\n  return 0;\n}}\n"
        );
        names.iter().for_each(|name| text += &format!("int {name}(void) {{ return 0; }}\n"));
        fs::write(&source, text).unwrap();
        let output = Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([&library, &source]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        library
    }

    const ALL: [&str; 7] = [
        "cublasCreate_v2",
        "cublasDestroy_v2",
        "cublasSetStream_v2",
        "cublasSetMathMode",
        "cublasSetWorkspace_v2",
        "cublasGetStatusName",
        "cublasGemmEx",
    ];

    fn named(path: &Path) -> impl Fn(&str) -> Option<OsString> {
        move |name| (name == "VLMQ_CUBLAS").then(|| path.into())
    }

    fn error(found: anyhow::Result<Cublas>) -> String {
        format!("{:#}", found.err().expect("there is none"))
    }

    #[test]
    fn places_are_looked_at_in_order() {
        let set = |name: &str| match name {
            "CUDA_HOME" => Some("/opt/cuda-a".into()),
            "CUDA_PATH" => Some("/opt/cuda-b".into()),
            _ => None,
        };
        let target = std::env::consts::ARCH.replace("aarch64", "sbsa");
        let all = [
            FILE.to_owned(),
            format!("/opt/cuda-a/lib64/{FILE}"),
            format!("/opt/cuda-b/lib64/{FILE}"),
            format!("/usr/local/cuda/lib64/{FILE}"),
            format!("/usr/local/cuda/targets/{target}-linux/lib/{FILE}"),
        ];
        assert_eq!(places(set), all.each_ref().map(PathBuf::from));
        assert_eq!(places(|_| Some("".into())), [&all[0], &all[3], &all[4]].map(PathBuf::from));
    }

    #[test]
    fn only_version_13_will_do() {
        let work = tempfile::tempdir().unwrap();
        let old = fake(&work.path().join("12"), [12, 8, 4], &ALL);
        let right = fake(&work.path().join("13"), [13, 1, 2], &ALL);
        let short = fake(&work.path().join("short"), [13, 0, 0], &ALL[1..]);
        let stub = fake(&work.path().join("stubs"), [13, 0, 0], &ALL);
        let (absent, nowhere) = (work.path().join("none").join(FILE), PathBuf::from("libcublas-of-nobody.so.13"));
        let other = work.path().join("text").join(FILE);
        fs::create_dir_all(other.parent().unwrap()).unwrap();
        fs::write(&other, "no library").unwrap();

        // The first that will do, past all that will not.
        let places = [&nowhere, &absent, &old, &stub, &short, &other].map(PathBuf::clone);
        let found = Cublas::first_of(&[&places[..], std::slice::from_ref(&right)].concat()).unwrap();
        assert_eq!(found.version.to_string(), "13.1.2");
        let why = error(Cublas::first_of(&places));
        for said in [
            "cuBLAS 13 is not found in libcublas-of-nobody.so.13 (".to_owned(),
            format!("{} (not there)", absent.display()),
            format!("{} (cuBLAS 12.8.4, where 13 is needed)", old.display()),
            format!("{} (a stub, for linkers only)", stub.display()),
            format!("{} (cuBLAS 13.0.0 without a function: ", short.display()),
            "cublasCreate_v2".to_owned(),
            format!("{} (", other.display()),
            "name libcublas.so.13 or its folder in VLMQ_CUBLAS".to_owned(),
        ] {
            assert!(why.contains(&said), "{said} is not in {why}");
        }

        // What is named counts alone, file or folder.
        for path in [&right, right.parent().unwrap()] {
            assert_eq!(Cublas::find(named(path)).unwrap().version.0, [13, 1, 2]);
        }
        let folder = old.parent().unwrap();
        let expected =
            format!("VLMQ_CUBLAS={}: {}: cuBLAS 12.8.4, where 13 is needed", folder.display(), old.display());
        assert_eq!(error(Cublas::find(named(folder))), expected);
        assert!(error(Cublas::find(named(&absent))).ends_with("not there"));
    }
}
