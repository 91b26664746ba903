//! ListOps expressions: operators and the parser.

/// What an operator does with its arguments, which are digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operator {
    Max,
    Min,
    Med,
    Sm,
}

impl Operator {
    /// All operators, in the order in which the generator draws them.
    pub(crate) const ALL: [Operator; 4] =
        [Operator::Max, Operator::Min, Operator::Med, Operator::Sm];

    /// The token that opens an operation.
    pub(crate) fn token(self) -> &'static str {
        match self {
            Operator::Max => "[MAX",
            Operator::Min => "[MIN",
            Operator::Med => "[MED",
            Operator::Sm => "[SM",
        }
    }

    /// The value of the operation; nothing without arguments.
    ///
    /// MED of an even number of arguments is the integer part of the mean of the two middle ones.
    pub(crate) fn apply(self, mut values: Vec<u8>) -> Option<u8> {
        values.sort_unstable();
        let (first, last) = (*values.first()?, *values.last()?);
        let n = values.len();
        Some(match self {
            Operator::Max => last,
            Operator::Min => first,
            Operator::Med => (values[(n - 1) / 2] + values[n / 2]) / 2,
            Operator::Sm => values.iter().fold(0, |sum, value| (sum + value) % 10),
        })
    }
}

/// The value of an expression such as `[MAX 2 9 [MIN 4 7 ] 0 ]`, whose tokens are parted by blanks.
///
/// # Errors
/// A sentence that names the first token (from 1) that cannot stand where it stands.
pub fn evaluate(expression: &str) -> Result<u8, String> {
    let mut open: Vec<(Operator, Vec<u8>)> = Vec::new();
    let mut result = None;
    for (i, token) in expression.split_whitespace().enumerate() {
        let refused = |why: &str| Err(format!("token {} ({token}): {why}", i + 1));
        if result.is_some() {
            return refused("the expression has ended before it");
        }
        let value = match (token.as_bytes(), operator(token)) {
            (_, Some(operator)) => {
                open.push((operator, Vec::new()));
                continue;
            }
            ([digit @ b'0'..=b'9'], _) => digit - b'0',
            (b"]", _) => match open.pop().map(|(operator, values)| operator.apply(values)) {
                Some(Some(value)) => value,
                Some(None) => return refused("the operator has no arguments"),
                None => return refused("no operator is open"),
            },
            _ => return refused("not a digit, ], [MAX, [MIN, [MED or [SM"),
        };
        match open.last_mut() {
            Some((_, values)) => values.push(value),
            None => result = Some(value),
        }
    }
    match (result, open.len()) {
        (Some(value), _) => Ok(value),
        (None, 0) => Err("the expression is empty".to_string()),
        (None, n) => Err(format!("the expression ends with {n} operators open")),
    }
}

fn operator(token: &str) -> Option<Operator> {
    Operator::ALL.into_iter().find(|operator| operator.token() == token)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn operators_follow_the_published_rules() {
        for (expression, value) in [
            ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
            ("[MIN 3 ]", 3),
            ("[MED 1 9 4 ]", 4),
            ("[MED 1 8 4 9 ]", 6),
            ("[MED 0 9 ]", 4),
            ("[SM 9 9 9 9 ]", 6),
            (" 7\n", 7),
        ] {
            assert_eq!(evaluate(expression), Ok(value), "{expression}");
        }
    }

    #[test]
    fn malformed_expressions_name_the_token() {
        for (expression, wanted) in [
            ("", "the expression is empty"),
            ("[MAX 1 2", "ends with 1 operators open"),
            ("[MAX 1 ] 2", "token 4 (2): the expression has ended before it"),
            ("[MAX ]", "token 2 (]): the operator has no arguments"),
            ("]", "token 1 (]): no operator is open"),
            ("[AVG 1 ]", "token 1 ([AVG): not a digit"),
            ("[MAX 12 ]", "token 2 (12): not a digit"),
            ("( 1 )", "token 1 ((): not a digit"),
        ] {
            let error = evaluate(expression).unwrap_err();
            assert!(error.contains(wanted), "{expression}: {error}");
        }
    }

    #[test]
    fn depth_is_not_limited_by_the_stack() {
        let depth = 200_000;
        let expression = format!("{}5{}", "[MAX ".repeat(depth), " ]".repeat(depth));
        assert_eq!(evaluate(&expression), Ok(5));
    }

    /// An expression as a tree, to be written and evaluated apart from the parser.
    #[derive(Clone, Debug)]
    enum Tree {
        Digit(u8),
        Operation(usize, Vec<Tree>),
    }

    impl Tree {
        fn text(&self) -> String {
            match self {
                Tree::Digit(digit) => digit.to_string(),
                Tree::Operation(operator, args) => {
                    let args: Vec<_> = args.iter().map(Tree::text).collect();
                    format!("[{} {} ]", ["MAX", "MIN", "MED", "SM"][*operator], args.join(" "))
                }
            }
        }

        fn value(&self) -> u32 {
            let Tree::Operation(operator, args) = self else {
                let Tree::Digit(digit) = self else { unreachable!() };
                return u32::from(*digit);
            };
            let mut values: Vec<_> = args.iter().map(Tree::value).collect();
            values.sort();
            let n = values.len();
            match operator {
                0 => values[n - 1],
                1 => values[0],
                2 if n % 2 == 1 => values[n / 2],
                2 => (values[n / 2 - 1] + values[n / 2]) / 2,
                _ => values.iter().sum::<u32>() % 10,
            }
        }
    }

    fn tree() -> impl Strategy<Value = Tree> {
        (0u8..10).prop_map(Tree::Digit).prop_recursive(6, 60, 5, |inner| {
            (0usize..4, prop::collection::vec(inner, 1..6))
                .prop_map(|(operator, args)| Tree::Operation(operator, args))
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(tree in tree()) {
            prop_assert_eq!(evaluate(&tree.text()).map(u32::from), Ok(tree.value()));
        }

        #[test]
        fn any_text_has_a_value_or_an_error(text in "(\\[|\\]|MAX|MIN|SM|[0-9]| |\\(|\u{e9})*") {
            let _ = evaluate(&text);
        }
    }
}
