//! Tables of methods: KL, agreement and likelihood of every method at every width, over several calibration draws.
//!
//! ```sh
//! cargo run --release --example methods_table                        # the small checkpoints, as a quick check
//! cargo run --release --example methods_table -- choices             # variations of the defaults on one of them
//! cargo run --release --example methods_table -- testbed BED --help  # a real small language model, see benches/testbed
//! ```
//!
//! Prints Markdown. The program needs no file of the project for the test bed: `target/release/examples/methods_table` can be
//! copied to where a GPU is.

mod record;
mod rows;
mod small;
mod summary;
mod testbed;

use anyhow::{Result, bail};
use clap::Parser;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [] => small::methods(&small::CHECKPOINTS),
        [name] if small::CHECKPOINTS.contains(name) => small::methods(&[name]),
        ["choices"] => small::choices(),
        ["testbed", rest @ ..] => {
            let name = ["methods_table testbed"];
            testbed::run(&testbed::Arguments::parse_from(name.iter().chain(rest)))
        }
        other => {
            bail!("unknown arguments {other:?}; none, one of {:?}, choices, or testbed BED", small::CHECKPOINTS)
        }
    }
}
