//! Outputs of kernels between guards, poisoned before each run.

/// An element of a buffer.
pub trait Element: Copy + PartialEq + std::fmt::Debug {
    /// What an output holds before the run: NaN where there is one.
    const POISON: Self;

    /// All bits, to compare what compares unequal to itself.
    fn bits(self) -> u64;
}

macro_rules! element {
    ($type:ty, $poison:expr, $bits:expr) => {
        impl Element for $type {
            const POISON: Self = $poison;

            fn bits(self) -> u64 {
                $bits(self)
            }
        }
    };
}

element!(f32, f32::NAN, |x: f32| u64::from(x.to_bits()));
element!(f64, f64::NAN, f64::to_bits);
element!(u8, 0xff, u64::from);
element!(u16, 0xffff, u64::from);
element!(u32, 0xdead_beef, u64::from);
element!(i32, -0x5a5a_5a5b, |x: i32| u64::from(x as u32));

/// Elements before and after what the kernel may write; a multiple of 16 bytes of every type.
const GUARD: usize = 64;

/// Device memory of the emulator with guards around it.
#[derive(Clone, Debug)]
pub struct Guarded<T> {
    all: Vec<T>,
    len: usize,
}

impl<T: Element> Guarded<T> {
    /// Poisoned.
    pub fn output(len: usize) -> Self {
        Self { all: vec![T::POISON; len + 2 * GUARD], len }
    }

    /// Holding values.
    pub fn holding(values: &[T]) -> Self {
        let mut buffer = Self::output(values.len());
        buffer.all[GUARD..GUARD + values.len()].copy_from_slice(values);
        buffer
    }

    /// For an argument struct.
    pub fn ptr(&mut self) -> *mut T {
        self.all[GUARD..].as_mut_ptr()
    }

    /// What it holds. The guards must be as they were.
    pub fn values(&self) -> &[T] {
        let guards = self.all[..GUARD].iter().chain(&self.all[GUARD + self.len..]);
        let touched = guards.enumerate().find(|(_, guard)| guard.bits() != T::POISON.bits());
        assert!(touched.is_none(), "guard {touched:?} around {} elements was written to", self.len);
        &self.all[GUARD..GUARD + self.len]
    }

    /// The bits of what it holds.
    pub fn bits(&self) -> Vec<u64> {
        bits(self.values())
    }
}

/// The bits of values, to compare what must agree in the last of them.
pub fn bits<T: Element>(values: &[T]) -> Vec<u64> {
    values.iter().map(|value| value.bits()).collect()
}

/// Numbers without pattern or period in [-1, 1).
pub fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / 8_388_608.0 - 1.0
    };
    next();
    (0..count).map(|_| next()).collect()
}
