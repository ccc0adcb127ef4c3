//! Chat templates that would run, grow or nest without end, or read files: each is refused, or harmless, and soon over.

use crate::support::alone::passed_alone;
use crate::support::process::{peak_kib, processor_time};
use crate::support::program::Bench;
use std::time::Duration;
use vlmq::data::dataset::{Message, Part};
use vlmq::data::template::ChatTemplate;

/// Most processor time for one template; the longest take a second.
const MAX_TIME: Duration = Duration::from_secs(10);

/// Most memory that one of them may take beyond what the test holds by itself: 64 MB of text that fuel buys, in a few
/// copies.
const MAX_MEMORY_KB: u64 = 512 << 10;

fn messages() -> Vec<Message> {
    let text = |text: &str| Part::Text(text.into());
    vec![Message { role: "user".into(), content: vec![text("what is  red?\n\n")], plain: false }]
}

/// What a template gives, or what is said of it. The time that it takes is the process's: for tests that run alone.
fn render(source: &str) -> Result<String, String> {
    let start = processor_time();
    let template = ChatTemplate::new(source, serde_json::Map::new(), "some.jinja".into());
    let result = template.and_then(|template| template.render(&messages(), true)).map_err(|error| format!("{error:#}"));
    let taken = processor_time() - start;
    let shown: String = source.chars().take(100).collect();
    assert!(taken < MAX_TIME, "{shown} took {taken:?}");
    if let Err(error) = &result {
        assert!(error.contains("some.jinja") && !error.contains('\n') && error.len() < 1000, "{shown}: {error}");
    }
    println!(
        "{taken:?} {shown}: {}",
        result.as_ref().map_or_else(|e| e.clone(), |text| format!("{} bytes", text.len()))
    );
    result
}

/// Asserts that a template is refused with these words.
fn refused(source: &str, says: &str) {
    let error = render(source).expect_err(source);
    assert!(error.contains(says), "{source}: {error}");
}

/// `start`, then `step` as often as a loop is allowed to, on `ns.s`.
fn grown(start: &str, step: &str, times: usize) -> String {
    format!(
        "{{% set ns = namespace(s={start}) %}}{{% for i in range({times}) %}}{{% set ns.s = {step} %}}{{% endfor %}}"
    )
}

#[test]
fn what_grows_or_never_ends_is_stopped() {
    if passed_alone(module_path!(), "what_grows_or_never_ends_is_stopped", &[]) {
        return;
    }
    let before = peak_kib();
    let out_of_fuel = "does not come to an end";
    // Strings and lists that double, by every way there is.
    for step in [
        "ns.s ~ ns.s",
        "ns.s + ns.s",
        "ns.s * 2",
        "ns.s.replace('x', 'xx')",
        "ns.s | replace('x', 'xx')",
        "ns.s.join([ns.s, ns.s])",
        "[ns.s, ns.s] | join",
        "''.join([ns.s, ns.s])",
        "'{}{}'.format(ns.s, ns.s)",
        "'%s%s' | format(ns.s, ns.s)",
    ] {
        refused(&grown("'x'", step, 60), out_of_fuel);
    }
    // One step that asks for all at once.
    for source in [
        "{{ 'x' * 99999999999 }}",
        "{{ 'x'.replace('', 'y' * 10000000) * 3 }}{{ ('x' * 10000000).replace('x', 'y' * 1000000) }}",
        "{{ ('x' * 10000000).replace('x', 'y' * 1000000) }}",
        "{{ ('x' * 1000000).join(['y'] * 100000) }}",
        "{{ ('x' * 10000000).split('x') | length }}",
        "{{ ('x ' * 10000000).split() | length }}",
        "{{ '%099999999d' | format(1) }}",
        "{{ 'a\nb' | indent(99999999999) }}",
        "{{ range(99999999999) | list }}",
    ] {
        render(source).expect_err(source);
    }
    refused("{{ '{:>999999999}'.format(1) }}", "at most 4 digits");
    refused("{{ messages | tojson(indent=99999999999) }}", "at most 64");
    // Loops, recursion, and cheap instructions on much text.
    let nested = "{% for a in range(90000) %}{% for b in range(90000) %}{{ b }}{% endfor %}{% endfor %}";
    refused(nested, out_of_fuel);
    refused("{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "some.jinja");
    refused("{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}", "some.jinja");
    for look in ["s.find('y')", "s.count('y')", "s.strip('abc')", "s.upper()", "'y' in s", "s == s ~ 'y'", "s | length"]
    {
        let source = format!(
            "{{% set s = 'x' * 9000000 %}}{{% for i in range(90000) %}}{{% if {look} %}}{{% endif %}}{{% endfor %}}"
        );
        // Some cost nothing, and may be done as often as a loop is allowed to turn.
        let _ = render(&source);
    }
    let used = peak_kib() - before;
    println!("{used} KiB");
    assert!(used < MAX_MEMORY_KB, "{used} KiB");
}

/// Lists that hold themselves twice, or a word a billion times, have an end, which nobody lives to see.
#[test]
fn lists_without_end_are_not_written() {
    if passed_alone(module_path!(), "lists_without_end_are_not_written", &[]) {
        return;
    }
    let branching = grown("[]", "[ns.s, ns.s]", 200);
    for show in
        ["{{ ns.s }}", "{{ ns.s | tojson }}", "{{ ''.join(ns.s) }}", "{{ '{}'.format(ns.s) }}", "{{ {}.get(ns.s) }}"]
    {
        render(&format!("{branching}{show}")).expect_err(show);
    }
    for source in ["{{ ['x'] * 99999999999 }}", "{{ [1] * 9999999999 }}", "{{ ([1] * 9999999999) | tojson }}"] {
        render(source).expect_err(source);
    }
}

/// Where no count of steps helps, the time does; the thread would go on, and ends with the program.
#[test]
fn what_takes_too_long_ends_the_program() {
    let branching = grown("[]", "[ns.s, ns.s]", 200);
    for source in [
        format!("{branching}{{{{ ns.s ~ '' }}}}"),
        format!("{branching}{{{{ raise_exception(ns.s) }}}}"),
        grown("['x']", "ns.s + ns.s", 60),
        // Compiled in a time that grows with the square of its length.
        format!("{{{{ a{} }}}}", "+1".repeat(32_000)),
    ] {
        let bench = Bench::new("flat-tied-bf16");
        let path = bench.file("chat_template.jinja");
        std::fs::write(&path, source).unwrap();
        bench.refused(&bench.eval(&[]), &["chat_template.jinja", "takes more than 1 s"]);
    }
}

/// What is nested as deeply as a template has bytes or fuel is walked through by recursion, also to free it.
#[test]
fn depth_does_not_end_the_program() {
    if passed_alone(module_path!(), "depth_does_not_end_the_program", &[]) {
        return;
    }
    let bytes = 65_000;
    let deep = |open: &str, middle: &str, close: &str| {
        let times = bytes / (open.len() + close.len());
        format!("{{{{ {}{middle}{} }}}}", open.repeat(times), close.repeat(times))
    };
    for source in [
        deep("(", "1", ")"),
        deep("[", "1", "]"),
        deep("-", "1", ""),
        deep("not ", "1", ""),
        deep("", "a", ".a"),
        deep("", "a", "[0]"),
        deep("", "a", "()"),
        deep("", "a", "|e"),
        deep("", "1", "+1"),
        deep("", "1", "**1"),
        deep("", "1", " and 1"),
        deep("", "1", " if 1 else 1"),
        deep("", "1", " in 1"),
        deep("", "1", "<1"),
        "{% if 1 %}".repeat(5_000),
        "{% if 1 %}x{% else %}".repeat(2_000) + &"{% endif %}".repeat(2_000),
        format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(5_000)),
        "{% for a in [1] %}".repeat(2_000) + &"{% endfor %}".repeat(2_000),
        "{% set x = [x] %}".repeat(3_800),
        "{% set x %}".repeat(2_500) + &"{% endset %}".repeat(2_500),
        "{% macro a() %}".repeat(2_000) + &"{% endmacro %}".repeat(2_000),
        "{% filter upper %}".repeat(1_900) + &"{% endfilter %}".repeat(1_900),
    ] {
        let _ = render(&source);
    }
    for step in
        ["[ns.s]", "{'a': ns.s}", "(ns.s,)", "ns.s | reverse", "ns.s | batch(2)", "namespace(s=ns.s)", "ns.s[::-1]"]
    {
        for walk in ["", "{{ ns.s }}", "{{ ns.s | tojson }}", "{{ ns.s == [ns.s] }}", "{{ ns.s.x }}"] {
            let loops = "{% for j in range(100) %}{% for i in range(9000) %}";
            let ends = "{% endfor %}{% endfor %}";
            let _ = render(&format!("{{% set ns = namespace(s=[]) %}}{loops}{{% set ns.s = {step} %}}{ends}{walk}"));
            let _ = render(&(grown("[]", step, 90_000) + walk));
        }
    }
}

#[test]
fn no_template_reads_a_file() {
    if passed_alone(module_path!(), "no_template_reads_a_file", &[]) {
        return;
    }
    for source in [
        "{% include '/etc/passwd' %}",
        "{% include 'chat_template.jinja' %}",
        "{% include ['a', '../b'] %}",
        "{% import '/etc/passwd' as p %}{{ p }}",
        "{% from 'Cargo.toml' import a %}",
        "{% extends '/etc/passwd' %}",
    ] {
        let error = render(source).expect_err(source);
        assert!(error.contains("template"), "{source}: {error}");
    }
    for source in [
        "{{ open('/etc/passwd').read() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ 'x'.encode().decode() }}",
        "{% include 'chat template' %}{% include 'chat template' %}",
    ] {
        render(source).expect_err(source);
    }
    assert_eq!(render("{% include 'none' ignore missing %}x").unwrap(), "x");
}

/// What real templates do costs little of what they may.
#[test]
fn methods_and_filters_of_real_templates_work() {
    if passed_alone(module_path!(), "methods_and_filters_of_real_templates_work", &[]) {
        return;
    }
    for (source, wanted) in [
        ("{{ messages[0].content[0].text.strip().split('?')[0].rstrip('d').lstrip() }}", "what is  re"),
        ("{{ 'a</think>b'.split('</think>')[-1].lstrip('\n').replace('b', 'c').upper() }}", "C"),
        ("{{ ', '.join(['a', 'b']).title() }}", "A, B"),
        ("{{ 'abc'.startswith(['x', 'a']) }}{{ 'abc'.endswith('c') }}{{ 'abcb'.count('b') }}", "TrueTrue2"),
        ("{{ {'a': 1}.get('a', 2) }}{{ {'a': 1}.get('b', 2) }}{{ {'a': 1}.items() | list | length }}", "121"),
        ("{{ '{:>5}|{}'.format(7, 'x') }}", "    7|x"),
        (
            "{{ messages[0] | tojson }}",
            r#"{"role": "user", "content": [{"type": "text", "text": "what is  red?\n\n"}]}"#,
        ),
        (
            "{{ {'b': [1, 2], 'a': none} | tojson(indent=1, sort_keys=true) }}",
            "{\n \"a\": null,\n \"b\": [\n  1,\n  2\n ]\n}",
        ),
        ("{%}", "{%}"),
    ] {
        match render(source) {
            Ok(text) => assert_eq!(text, wanted, "{source}"),
            Err(error) => assert!(source == "{%}", "{source}: {error}"),
        }
    }
}
