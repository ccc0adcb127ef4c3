//! Puts the commit into the version, where the builder names it: `VLMQ_COMMIT=$(git rev-parse HEAD) cargo build`.
//!
//! It is not asked of git here: a commit would rebuild the crate each time, or be that of an earlier build.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=VLMQ_COMMIT");
    let version = std::env::var("CARGO_PKG_VERSION").unwrap_or_default();
    let version = match std::env::var("VLMQ_COMMIT") {
        Ok(commit) if !commit.is_empty() => format!("{version}+{commit}"),
        _ => version,
    };
    println!("cargo:rustc-env=VLMQ_VERSION={version}");
}
