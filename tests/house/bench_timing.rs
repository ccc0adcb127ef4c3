//! How the benches repeat short calls, on times that are made up.

#[path = "../../benches/timing.rs"]
mod timing;

use std::time::Duration;

#[test]
fn a_call_is_repeated_until_it_fills_a_sample() {
    let least = Duration::from_millis(5);
    for (micros, expected) in [(9000, 1), (5000, 1), (4999, 2), (700, 8), (40, 128), (1, 8192)] {
        let call = Duration::from_micros(micros);
        let found = timing::repeat(least, |calls| Ok(call * calls)).unwrap();
        assert_eq!(found, (expected, call * expected), "a call of {call:?}");
    }
    let error = timing::repeat(least, |calls| if calls < 4 { Ok(Duration::ZERO) } else { anyhow::bail!("of {calls}") });
    assert_eq!(error.unwrap_err().to_string(), "of 4");
}
