//! JSON of strangers as values, up to a number of them: an empty list has three bytes in a file and a hundred in memory.

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use std::borrow::Cow;
use std::cell::Cell;
use std::fmt;

/// Reads a text of one value, which holds at most `most` values, itself included. Errors as serde_json's readers, and where it has
/// more.
pub(crate) fn value(text: &[u8], most: usize) -> serde_json::Result<Value> {
    let mut reader = serde_json::Deserializer::from_slice(text);
    let value = Values::new(most).deserialize(&mut reader)?;
    reader.end()?;
    Ok(value)
}

/// The first key of a text of one object whose value holds more than `most` of the key values, itself included. Nothing is built;
/// what is no JSON is left to whoever builds it.
pub(crate) fn overfull(text: &[u8], most: impl Fn(&str) -> usize) -> Option<String> {
    struct Keys<'a, F>(F, &'a Cell<Option<String>>);

    impl<'de, F: Fn(&str) -> usize> Visitor<'de> for Keys<'_, F> {
        type Value = ();

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<(), A::Error> {
            while let Some(key) = object.next_key::<Cow<'_, str>>()? {
                let values = Values { build: false, ..Values::new((self.0)(&key)) };
                if let Err(error) = object.next_value_seed(&values) {
                    self.1.set(values.are_too_few().then(|| key.into_owned()));
                    return Err(error);
                }
            }
            Ok(())
        }
    }

    let found = Cell::new(None);
    // Its errors are those of the file.
    let _ = serde_json::Deserializer::from_slice(text).deserialize_map(Keys(most, &found));
    found.take()
}

/// Reads values as long as some are left to be taken.
#[derive(Debug)]
pub(crate) struct Values {
    most: usize,
    left: Cell<usize>,
    /// Or else all of them are null.
    build: bool,
    asked_too_often: Cell<bool>,
}

impl Values {
    /// Takes at most `most`.
    pub(crate) fn new(most: usize) -> Self {
        Self { most, left: Cell::new(most), build: true, asked_too_often: Cell::new(false) }
    }

    /// Counts one value. Errors where none is left.
    pub(crate) fn take<E: Error>(&self) -> Result<(), E> {
        match self.left.get().checked_sub(1) {
            Some(left) => {
                self.left.set(left);
                Ok(())
            }
            None => {
                self.asked_too_often.set(true);
                Err(E::custom(format_args!("it holds more than {} values", self.most)))
            }
        }
    }

    /// Whether one was asked for that was not left.
    pub(crate) fn are_too_few(&self) -> bool {
        self.asked_too_often.get()
    }
}

impl<'de> DeserializeSeed<'de> for &Values {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.take()?;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for &Values {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any valid JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(if self.build { value.into() } else { Value::Null })
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = list.next_element_seed(self)? {
            if self.build {
                values.push(value);
            }
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Value, A::Error> {
        let mut values = Map::new();
        while let Some(key) = object.next_key::<String>()? {
            let value = object.next_value_seed(self)?;
            if self.build {
                values.insert(key, value);
            }
        }
        Ok(Value::Object(values))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_serde_json() {
        let text =
            r#"{"a": [1, -2, 1.5, 1e-06, "x\u00e9\n", null, true, {}, []], "b": {"c": 18446744073709551615}, "a2": 0}"#;
        let read: Value = serde_json::from_str(text).unwrap();
        let count = 14;
        let same = value(text.as_bytes(), count).unwrap();
        assert_eq!((&same, same.to_string()), (&read, read.to_string()));
        let error = value(text.as_bytes(), count - 1).unwrap_err().to_string();
        assert!(error.contains("more than 13 values"), "{error}");
        for broken in ["", "[1", "[1] 2", "{\"a\":}", &"[".repeat(1000)] {
            let expected = serde_json::from_str::<Value>(broken).unwrap_err().to_string();
            assert_eq!(value(broken.as_bytes(), 1000).unwrap_err().to_string(), expected, "{broken}");
        }
    }

    #[test]
    fn values_are_counted_by_key() {
        let text = br#"{"a": [1, {"x": 2}], "b\n": [[], []], "c": {}}"#;
        for (most, expected) in [(5, None), (3, Some("a")), (0, Some("a"))] {
            assert_eq!(overfull(text, |_| most).as_deref(), expected);
        }
        assert_eq!(overfull(text, |key| if key == "a" { 4 } else { 2 }).as_deref(), Some("b\n"));
        assert_eq!(overfull(b"[1, 2", |_| 0), None);
    }
}
