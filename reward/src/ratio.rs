//! Exact rational values, with a floating-point stand-in for what does not fit.

/// Largest relative difference at which two values that are not exact count as equal.
const TOLERANCE: f64 = 1e-6;

/// The value of a number.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Value {
    /// Numerator and denominator in lowest terms, the denominator positive.
    Exact(i128, i128),
    /// A finite value that does not fit the fraction.
    Approximate(f64),
}

impl Value {
    /// `numerator / denominator`, or none if that is a division by zero.
    pub fn fraction(numerator: i128, denominator: i128) -> Option<Value> {
        let divisor = i128::try_from(gcd(numerator, denominator)).ok().filter(|d| *d != 0);
        let (Some(divisor), true) = (divisor, denominator != 0) else {
            return Self::finite(numerator as f64 / denominator as f64);
        };
        let (n, d) = (numerator / divisor, denominator / divisor);
        if d > 0 {
            return Some(Value::Exact(n, d));
        }
        match (n.checked_neg(), d.checked_neg()) {
            (Some(n), Some(d)) => Some(Value::Exact(n, d)),
            _ => Self::finite(n as f64 / d as f64),
        }
    }

    /// `0.digits`-style decimals: the integer `digits` times ten to the power of `exponent`; none
    /// beyond the range of an f64.
    pub fn decimal(digits: &str, exponent: i32) -> Option<Value> {
        let kept = digits.trim_end_matches('0');
        let zeros = i32::try_from(digits.len() - kept.len()).ok()?;
        let exponent = exponent.checked_add(zeros)?;
        if kept.is_empty() {
            return Some(Value::Exact(0, 1));
        }
        let power = 10i128.checked_pow(exponent.unsigned_abs());
        match (kept.parse::<i128>().ok(), power) {
            (Some(n), Some(power)) if exponent < 0 => Self::fraction(n, power),
            (Some(n), Some(power)) if n.checked_mul(power).is_some() => {
                Self::fraction(n * power, 1)
            }
            _ => Self::finite(format!("{kept}e{exponent}").parse().ok()?),
        }
    }

    /// The sum; none beyond the range of an f64.
    pub fn plus(self, other: Value) -> Option<Value> {
        if let (Value::Exact(a, b), Value::Exact(c, d)) = (self, other) {
            let numerator =
                a.checked_mul(d).zip(c.checked_mul(b)).and_then(|(x, y)| x.checked_add(y));
            if let (Some(numerator), Some(denominator)) = (numerator, b.checked_mul(d)) {
                return Self::fraction(numerator, denominator);
            }
        }
        Self::finite(self.as_f64() + other.as_f64())
    }

    /// The quotient; none for a division by zero or beyond the range of an f64.
    pub fn over(self, other: Value) -> Option<Value> {
        if let (Value::Exact(a, b), Value::Exact(c, d)) = (self, other)
            && let (Some(numerator), Some(denominator)) = (a.checked_mul(d), b.checked_mul(c))
        {
            return Self::fraction(numerator, denominator);
        }
        Self::finite(self.as_f64() / other.as_f64())
    }

    /// The value with its sign changed.
    pub fn negated(self) -> Value {
        match self {
            Value::Exact(n, d) => match n.checked_neg() {
                Some(n) => Value::Exact(n, d),
                None => Value::Approximate(-self.as_f64()),
            },
            Value::Approximate(x) => Value::Approximate(-x),
        }
    }

    /// The nearest f64.
    pub fn as_f64(self) -> f64 {
        match self {
            Value::Exact(n, d) => n as f64 / d as f64,
            Value::Approximate(x) => x,
        }
    }

    /// Whether both are the same number: exactly if both are exact, else up to one millionth.
    pub fn same(self, other: Value) -> bool {
        match (self, other) {
            (Value::Exact(a, b), Value::Exact(c, d)) => (a, b) == (c, d),
            _ => {
                let (x, y) = (self.as_f64(), other.as_f64());
                (x - y).abs() <= TOLERANCE * x.abs().max(y.abs())
            }
        }
    }

    fn finite(x: f64) -> Option<Value> {
        x.is_finite().then_some(Value::Approximate(x))
    }
}

/// Greatest common divisor by Euclid's algorithm.
fn gcd(a: i128, b: i128) -> u128 {
    let (mut a, mut b) = (a.unsigned_abs(), b.unsigned_abs());
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimals_are_exact() -> Result<(), String> {
        let tenth = Value::decimal("1", -1).ok_or("0.1")?;
        let fifth = Value::decimal("20", -2).ok_or("0.20")?;
        let sum = tenth.plus(fifth).ok_or("sum")?;
        assert!(sum.same(Value::fraction(3, 10).ok_or("3/10")?));
        assert!(!sum.same(Value::decimal("30000001", -8).ok_or("0.30000001")?));
        Ok(())
    }

    #[test]
    fn what_overflows_is_compared_up_to_a_millionth() -> Result<(), String> {
        let big = Value::decimal(&"7".repeat(60), 0).ok_or("big")?;
        let near = Value::decimal(&("7".repeat(59) + "1"), 0).ok_or("near")?;
        assert!(big.same(near));
        assert!(!big.same(big.plus(big).ok_or("double")?));
        assert!(Value::decimal(&"7".repeat(400), 0).is_none());
        let least = Value::fraction(i128::MIN, -1).ok_or("least")?;
        assert!(least.as_f64() > 1e38);
        Ok(())
    }

    #[test]
    fn division_by_zero_has_no_value() -> Result<(), String> {
        let one = Value::fraction(1, 1).ok_or("one")?;
        assert!(one.over(Value::decimal("0", 0).ok_or("zero")?).is_none());
        assert!(Value::fraction(0, 0).is_none());
        Ok(())
    }
}
