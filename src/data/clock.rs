//! The date, for the few templates that state it.

use minijinja::{Error, ErrorKind};
use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

/// The present date in the notation of C's `strftime`, in UTC; a template that calls it gives other text tomorrow.
pub(super) fn strftime_now(format: String) -> Result<String, Error> {
    log::warn!("the chat template writes today's date into every prompt; results depend on the day they are made");
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    strftime(seconds, &format)
}

/// `seconds` after 1970-01-01 UTC under `format`. Errors on directives that dates in prompts do not use.
fn strftime(seconds: u64, format: &str) -> Result<String, Error> {
    let days = seconds / 86_400;
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let mut out = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        let month_name = MONTHS[month as usize - 1];
        // 1970-01-01 was a Thursday.
        let day_name = DAYS[((days + 3) % 7) as usize];
        match characters.next() {
            Some('Y') => out += &year.to_string(),
            Some('y') => out += &format!("{:02}", year % 100),
            Some('m') => out += &format!("{month:02}"),
            Some('B') => out += month_name,
            Some('b') => out += &month_name[..3],
            Some('d') => out += &format!("{day:02}"),
            Some('A') => out += day_name,
            Some('a') => out += &day_name[..3],
            Some('H') => out += &format!("{hour:02}"),
            Some('M') => out += &format!("{minute:02}"),
            Some('S') => out += &format!("{second:02}"),
            Some('%') => out.push('%'),
            other => {
                let name = other.map(String::from).unwrap_or_default();
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("strftime_now does not know %{name}; known: %Y %y %m %B %b %d %A %a %H %M %S"),
                ));
            }
        }
    }
    Ok(out)
}

/// `(year, month, day)` of a day counted from 1970-01-01 (proleptic Gregorian calendar).
fn civil(mut days: u64) -> (u64, u64, u64) {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    loop {
        let length = if leap(year) { 366 } else { 365 };
        if days < length {
            break;
        }
        days -= length;
        year += 1;
    }
    let mut month = 1;
    for length in [31, if leap(year) { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1)
}

#[cfg(test)]
mod tests {
    use super::strftime;

    #[test]
    fn dates() {
        // Seconds from `date -u -d .. +%s`.
        for (seconds, text) in [
            (0, "Thu 01 Jan 1970 00:00:00"),
            (951_827_696, "Tue 29 Feb 2000 12:34:56"),
            (1_735_689_599, "Tue 31 Dec 2024 23:59:59"),
            (4_107_542_400, "Mon 01 Mar 2100 00:00:00"),
        ] {
            assert_eq!(strftime(seconds, "%a %d %b %Y %H:%M:%S").unwrap(), text);
        }
        assert_eq!(strftime(0, "%A, %B %m %y 100%%").unwrap(), "Thursday, January 01 70 100%");
        assert!(strftime(0, "%Q").is_err() && strftime(0, "%").is_err());
    }
}
