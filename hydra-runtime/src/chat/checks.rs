//! Puts checks into a template's source, so that no value in it gets too large or too deep: `{% set x = EXPRESSION %}`
//! becomes `{% set x = (EXPRESSION)|hydra_bounded %}`, and so for sums, products, lists, tuples and maps.

use minijinja::machinery::ast::{BinOpKind, Call, CallArg, Expr, Macro, Stmt};
use minijinja::machinery::{Span, Token, parse, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Error, ErrorKind};

/// Bytes of a template; the longest in use have some 30,000.
const MOST_SOURCE: usize = 1 << 20;
/// Tokens between `{{` and `}}`, or `{%` and `%}`: they are parsed and compiled by functions that call themselves.
const MOST_TOKENS: usize = 500;

/// Conditions in which a place can be: `if`s around it, and before it in the `if` and `elif`s of each. Each nests in the one before.
const MOST_CONDITIONS: usize = 200;

/// The filter for values: its name is one that no template uses by accident.
pub(super) const BOUNDED: &str = "hydra_bounded";
/// The filter for values that become part of a namespace.
pub(super) const PLAIN: &str = "hydra_plain";

/// The filter for what is looked at in full.
pub(super) const PAID: &str = "hydra_paid";
/// The filter for what is looked at in full if it is a text.
pub(super) const TEXT: &str = "hydra_text";
/// The filter in place of the operator `%`.
pub(super) const REMAINDER: &str = "hydra_remainder";
/// Bytes of a text in a template's source that is compared without paying.
const SHORT: usize = 64;

/// The source with its checks.
pub(super) fn insert(name: &'static str, source: &str, syntax: SyntaxConfig) -> Result<String, Error> {
    short(source, syntax.clone())?;
    let mut checks = Checks { source, inserted: Vec::new() };
    checks.statement(&parse(source, name, syntax)?)?;
    // What ends at a place goes before what begins there; of several that end there, the inner ones come first already.
    checks.inserted.sort_by_key(|inserted| (inserted.at, inserted.begins));
    let (mut text, mut done) = (String::with_capacity(source.len() * 2), 0);
    for Inserted { at, instead, text: inserted, .. } in checks.inserted {
        text += &source[done..at];
        text += &inserted;
        done = at + instead;
    }
    Ok(text + &source[done..])
}

/// Fails if the template or one of its tags is too long.
fn short(source: &str, syntax: SyntaxConfig) -> Result<(), Error> {
    let refused = |what: String| Err(Error::new(ErrorKind::SyntaxError, what));
    if source.len() > MOST_SOURCE {
        return refused(format!("a template of {} bytes: expected at most {MOST_SOURCE}", source.len()));
    }
    let (mut tokens, mut begins) = (0, false);
    // How many conditions each `if` that is open has.
    let mut open: Vec<usize> = Vec::new();
    let mut conditions = 0;
    for token in tokenize(source, false, syntax) {
        let (token, span) = token?;
        match token {
            Token::Ident("if") if begins => {
                open.push(1);
                conditions += 1;
            }
            Token::Ident("elif") if begins => {
                conditions += 1;
                open.iter_mut().last().into_iter().for_each(|of| *of += 1);
            }
            Token::Ident("endif") if begins => conditions -= open.pop().unwrap_or(0).min(conditions),
            _ => {}
        }
        if conditions > MOST_CONDITIONS {
            let what = format!("line {}: more than {MOST_CONDITIONS} conditions within each other", span.start_line);
            return refused(what);
        }
        begins = matches!(token, Token::BlockStart);
        tokens = if matches!(token, Token::VariableStart | Token::BlockStart) { 0 } else { tokens + 1 };
        if tokens > MOST_TOKENS {
            return refused(format!("line {}: a tag of more than {MOST_TOKENS} words and signs", span.start_line));
        }
    }
    Ok(())
}

struct Inserted {
    at: usize,
    /// Whether it opens a parenthesis before what is there.
    begins: bool,
    /// The bytes of the source in whose place it is put.
    instead: usize,
    text: String,
}

struct Checks<'a> {
    source: &'a str,
    inserted: Vec<Inserted>,
}

impl Checks<'_> {
    /// Puts one text before `start..end` and one behind it.
    fn around(&mut self, start: usize, end: usize, before: &str, behind: String) {
        self.inserted.push(Inserted { at: start, begins: true, instead: 0, text: before.into() });
        self.inserted.push(Inserted { at: end, begins: false, instead: 0, text: behind });
    }

    fn check(&mut self, start: usize, end: usize, filter: &str) {
        self.around(start, end, "(", format!(")|{filter}"));
    }

    /// With parentheses around all of it, for what may follow: `[1, 2][0]`.
    fn closed(&mut self, start: usize, end: usize) {
        self.around(start, end, "((", format!(")|{BOUNDED})"));
    }

    /// Makes a filter's argument of what is behind a `%`.
    fn remainder(&mut self, left: &Expr<'_>, right: &Expr<'_>) {
        let behind = range(left.span()).1;
        // But for parentheses and space it is all that there is between the operands.
        let between = self.source.get(behind..first(right));
        let Some(at) = between.and_then(|between| between.find('%')).map(|at| behind + at) else { return };
        self.around(first(left), range(right.span()).1, "(", ")".into());
        self.inserted.push(Inserted { at, begins: false, instead: 1, text: format!(")|{REMAINDER}(") });
    }

    fn statements(&mut self, statements: &[Stmt<'_>]) -> Result<(), Error> {
        statements.iter().try_for_each(|statement| self.statement(statement))
    }

    fn statement(&mut self, statement: &Stmt<'_>) -> Result<(), Error> {
        match statement {
            Stmt::Template(template) => self.statements(&template.children)?,
            Stmt::EmitExpr(emit) => self.expression(&emit.expr),
            Stmt::ForLoop(each) => {
                self.expression(&each.iter);
                self.text(&each.iter);
                self.all(&each.filter_expr);
                self.statements(&each.body)?;
                self.statements(&each.else_body)?;
            }
            Stmt::IfCond(condition) => {
                self.expression(&condition.expr);
                self.statements(&condition.true_body)?;
                self.statements(&condition.false_body)?;
            }
            Stmt::WithBlock(with) => {
                with.assignments.iter().for_each(|(_, value)| self.expression(value));
                self.statements(&with.body)?;
            }
            Stmt::Set(set) => {
                match &set.expr {
                    // Its own span may begin behind its first part.
                    Expr::Tuple(tuple) => self.all(&tuple.items),
                    value => self.expression(value),
                }
                let (start, end) = range(set.span());
                let equals = self.source[start..end].find('=').expect("a target, \"=\" and a value");
                let filter = match &set.target {
                    Expr::GetAttr(target) => match &target.expr {
                        Expr::Var(namespace) => format!("{PLAIN}({})", namespace.id),
                        _ => PLAIN.into(),
                    },
                    _ => BOUNDED.into(),
                };
                self.check(start + equals + 1, end, &filter);
            }
            Stmt::SetBlock(set) => {
                self.all(&set.filter);
                self.statements(&set.body)?;
            }
            Stmt::AutoEscape(escape) => {
                self.expression(&escape.enabled);
                self.statements(&escape.body)?;
            }
            Stmt::FilterBlock(filtered) => {
                self.expression(&filtered.filter);
                self.statements(&filtered.body)?;
            }
            Stmt::Macro(defined) => self.defined(defined)?,
            Stmt::CallBlock(block) => {
                self.call(&block.call);
                self.defined(&block.macro_decl)?;
            }
            Stmt::Do(call) => self.call(&call.call),
            Stmt::EmitRaw(_) | Stmt::Continue(_) | Stmt::Break(_) => {}
            // If another crate switches `multi_template` on.
            #[allow(unreachable_patterns)]
            _ => return Err(Error::new(ErrorKind::SyntaxError, "a template can't use other templates or blocks")),
        }
        Ok(())
    }

    fn defined(&mut self, defined: &Macro<'_>) -> Result<(), Error> {
        self.all(&defined.defaults);
        self.statements(&defined.body)
    }

    fn all<'e>(&mut self, expressions: impl IntoIterator<Item = &'e Expr<'e>>) {
        expressions.into_iter().for_each(|expression| self.expression(expression));
    }

    fn call(&mut self, call: &Call<'_>) {
        self.expression(&call.expr);
        self.arguments(&call.args);
    }

    fn arguments(&mut self, arguments: &[CallArg<'_>]) {
        for argument in arguments {
            match argument {
                CallArg::Pos(value) | CallArg::Kwarg(_, value) => {
                    self.expression(value);
                    self.text(value);
                }
                CallArg::PosSplat(value) | CallArg::KwargSplat(value) => self.expression(value),
            }
        }
    }

    fn expression(&mut self, expression: &Expr<'_>) {
        match expression {
            Expr::Var(_) | Expr::Const(_) => {}
            Expr::Slice(slice) => {
                self.expression(&slice.expr);
                [&slice.start, &slice.stop, &slice.step].into_iter().for_each(|part| self.all(part));
                self.text(&slice.expr);
                self.closed(first(&slice.expr), range(slice.span()).1);
            }
            Expr::UnaryOp(operator) => self.expression(&operator.expr),
            Expr::BinOp(operator) => {
                self.operand(operator.op, &operator.left);
                self.operand(operator.op, &operator.right);
                self.compared(operator.op, &[&operator.left, &operator.right]);
                match operator.op {
                    BinOpKind::Add | BinOpKind::Mul => {
                        let (start, end) = range(operator.span());
                        self.check(start, end, BOUNDED);
                    }
                    BinOpKind::Rem => self.remainder(&operator.left, &operator.right),
                    _ => {}
                }
            }
            Expr::Compare(compare) => {
                self.expression(&compare.expr);
                compare.ops.iter().for_each(|operator| self.expression(&operator.expr));
                let operands = std::iter::once(&compare.expr).chain(compare.ops.iter().map(|operator| &operator.expr));
                self.compared(BinOpKind::Eq, &operands.collect::<Vec<_>>());
            }
            Expr::IfExpr(either) => {
                self.expression(&either.test_expr);
                self.expression(&either.true_expr);
                self.all(&either.false_expr);
            }
            Expr::Filter(filter) => {
                self.all(&filter.expr);
                self.arguments(&filter.args);
            }
            Expr::Test(test) => {
                self.expression(&test.expr);
                // In parentheses what follows an argument would follow the test. They are paid for as they are compared.
                for argument in &test.args {
                    if let CallArg::Pos(value) | CallArg::Kwarg(_, value) = argument {
                        self.expression(value);
                    }
                }
            }
            Expr::GetAttr(attribute) => self.expression(&attribute.expr),
            Expr::GetItem(item) => {
                self.expression(&item.expr);
                self.expression(&item.subscript_expr);
                if !matches!(&item.subscript_expr, Expr::Const(name) if name.value.as_str().is_some()) {
                    self.text(&item.expr);
                }
                self.text(&item.subscript_expr);
            }
            Expr::Call(call) => self.call(call),
            Expr::List(_) | Expr::Tuple(_) | Expr::Map(_) => {
                self.parts(expression);
                let (start, end) = range(expression.span());
                self.closed(start, end);
            }
        }
    }

    fn compared(&mut self, operator: BinOpKind, operands: &[&Expr<'_>]) {
        use BinOpKind::{Eq, Gt, Gte, In, Lt, Lte, Ne};
        // With something short there is little to compare.
        let free = |operand: &&Expr<'_>| matches!(operand, Expr::Const(value) if value.value.as_str().is_none_or(|text| text.len() <= SHORT));
        if matches!(operator, Eq | Ne | Lt | Lte | Gt | Gte | In) && !operands.iter().any(free) {
            operands.iter().for_each(|operand| self.check(first(operand), range(operand.span()).1, PAID));
        }
    }

    /// A text that is looked at in full, unless it is in the source.
    fn text(&mut self, value: &Expr<'_>) {
        if !matches!(value, Expr::Const(_)) {
            self.around(first(value), range(value.span()).1, "((", format!(")|{TEXT})"));
        }
    }

    /// An operand of a sum or product that is itself one needs no check: the whole has one.
    fn operand(&mut self, operator: BinOpKind, operand: &Expr<'_>) {
        let sums = |operator| matches!(operator, BinOpKind::Add | BinOpKind::Mul);
        match operand {
            Expr::BinOp(inner) if sums(operator) && sums(inner.op) => {
                self.operand(inner.op, &inner.left);
                self.operand(inner.op, &inner.right);
            }
            other => self.expression(other),
        }
    }

    /// What a list, tuple or map consists of. Those directly in it need no check: the whole has one.
    fn parts(&mut self, container: &Expr<'_>) {
        let parts: Vec<&Expr<'_>> = match container {
            Expr::List(list) => list.items.iter().collect(),
            Expr::Tuple(tuple) => tuple.items.iter().collect(),
            Expr::Map(map) => map.keys.iter().chain(&map.values).collect(),
            other => return self.expression(other),
        };
        parts.into_iter().for_each(|part| self.parts(part));
    }
}

/// Where the first name or value of an expression begins. A parenthesis before it may belong to the expression, so that it makes
/// no difference on which side of that another one is put.
fn first(expression: &Expr<'_>) -> usize {
    match expression {
        Expr::Slice(slice) => first(&slice.expr),
        Expr::BinOp(operator) => first(&operator.left),
        Expr::Compare(compare) => first(&compare.expr),
        Expr::IfExpr(either) => first(&either.true_expr),
        Expr::Filter(filter) => filter.expr.as_ref().map_or(range(filter.span()).0, first),
        Expr::Test(test) => first(&test.expr),
        Expr::GetAttr(attribute) => first(&attribute.expr),
        Expr::GetItem(item) => first(&item.expr),
        Expr::Call(call) => first(&call.expr),
        other => range(other.span()).0,
    }
}

/// Where it begins and ends in the source.
fn range(span: Span) -> (usize, usize) {
    (span.start_offset as usize, span.end_offset as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inserted(source: &str) -> String {
        let text = insert("test", source, SyntaxConfig::default()).unwrap();
        text.replace("hydra_bounded", "b")
            .replace("hydra_plain", "p")
            .replace("hydra_paid", "c")
            .replace("hydra_remainder", "r")
            .replace("hydra_text", "t")
    }

    #[test]
    fn checks_are_around_what_makes_values() {
        assert_eq!(inserted("a {{ 'b' ~ c.d|trim }}"), "a {{ 'b' ~ c.d|trim }}");
        assert_eq!(inserted("{%- set x = 1 if y else 2 -%}"), "{%- set x =( 1 if y else 2)|b -%}");
        assert_eq!(inserted("{% set n.x = 'é' ~ n.x %}ü"), "{% set n.x =( 'é' ~ n.x)|p(n) %}ü");
        assert_eq!(inserted("{% set a, b = 1, [c] %}"), "{% set a, b =( 1, (([c])|b))|b %}");
        assert_eq!(inserted("{{ (a + b) + c * d ~ [] * 9|f }}"), "{{ ((a + b) + (c * d)|b ~ ((([])|b) * 9|f)|b)|b }}");
        assert_eq!(inserted("{{ [[1], {'a': (b, [c + d])}] }}"), "{{ (([[1], {'a': (b, [(c + d)|b])}])|b) }}");
        assert_eq!(
            inserted("{{ a.b[1:][0] + (f(c)|d)[:2].e }}"),
            "{{ (((((((a.b)|t)[1:])|b))|t)[0] + (((((f(((c)|t))|d)|t))[:2])|b).e)|b }}"
        );
        assert_eq!(inserted("{{ (a % b) %c|d - x.y % (2) }}"), "{{ (((a )|r( b)) )|r(c|d) - (x.y )|r( (2)) }}");
        assert_eq!(inserted("{{ '%s%%' % (a, [b]) }}"), "{{ ('%s%%' )|r( (((a, [b]))|b)) }}");
        assert_eq!(inserted("{{ [1][0] ~ {'a': 1}.a }}"), "{{ (((([1])|b))|t)[0] ~ (({'a': 1})|b).a }}");
        assert_eq!(
            inserted("{% for x in (1, y) if x == x + 1 %}{% set x %}{{ -x * 2 }}{% endset %}{% endfor %}"),
            "{% for x in (((((1, y))|b))|t) if (x)|c == ((x + 1)|b)|c %}{% set x %}{{ (-x * 2)|b }}{% endset %}{% endfor %}"
        );
        assert_eq!(
            inserted("{% macro m(a=[b]) %}{% endmacro %}{{ m(x=a+b, *c) }}{% call m([c]) %}{% endcall %}"),
            "{% macro m(a=(([b])|b)) %}{% endmacro %}{{ m(x=(((a+b)|b)|t), *c) }}{% call m((((([c])|b))|t)) %}{% endcall %}"
        );
    }

    #[test]
    fn long_tags_and_templates_are_refused() {
        let refused = |source: String| insert("test", &source, SyntaxConfig::default()).unwrap_err().to_string();
        assert!(refused(format!("{{{{ 1{} }}}}", "|abs".repeat(1000))).contains("a tag of more than 500"));
        assert!(refused(" ".repeat(MOST_SOURCE + 1)).contains("1048577 bytes"));
        // Nested by `elif` as by `if`.
        let elifs = |count| format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(count));
        assert!(refused(elifs(20_000)).contains("more than 200 conditions"));
        let within = format!("{}{}", "{% if 1 %}".repeat(100), elifs(100));
        assert!(refused(within).contains("conditions"));
        assert!(insert("test", &elifs(199).repeat(9), SyntaxConfig::default()).is_ok());
        assert!(insert("test", &"{{ 1 + 1 }}".repeat(9000), SyntaxConfig::default()).is_ok());
    }
}
