"""The queries of the dashboard and of the alerts, with the metrics, labels and values they use."""

import json
import re
from dataclasses import dataclass, field

# Grafana's variables, with example values.
VARIABLES = {"$__rate_interval": "5m", "$__interval": "1m", "$__range": "1h", "$edge": ".*"}
KEYWORDS = set(
    "and or unless offset bool inf nan by without on ignoring group_left group_right".split()
)
GROUPING = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\[[^\]]*\]|\d[\w.]*|[A-Za-z_:][\w:]*|\S')
MATCHER = re.compile(r'\s*(\w+)\s*(=~|!~|!=|=)\s*"((?:[^"\\]|\\.)*)"\s*,?')
SHOWN = re.compile(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}")


@dataclass
class Query:
    where: str
    text: str
    # Labels of the result that a legend or an annotation shows.
    shown: set = field(default_factory=set)
    # Metrics with their matchers, as (label, operator, value).
    metrics: list = field(default_factory=list)
    grouped: set = field(default_factory=set)

    def __post_init__(self):
        for variable, value in VARIABLES.items():
            self.text = self.text.replace(variable, value)
        for _, labels in GROUPING.findall(self.text):
            self.grouped |= {label.strip() for label in labels.split(",") if label.strip()}
        tokens = list(TOKEN.finditer(GROUPING.sub(" ", self.text)))
        self._read(tokens)

    def _read(self, tokens):
        depth = 0
        for at, token in enumerate(tokens):
            word, following = token.group(), tokens[at + 1].group() if at + 1 < len(tokens) else ""
            depth += {"{": 1, "}": -1}.get(word, 0)
            if depth or not re.match(r"[A-Za-z_:]", word):
                continue
            if word.lower() in KEYWORDS or following == "(":
                continue
            # `sum by (x) (...)`: without the grouping, `(` follows the aggregation.
            matchers = []
            if following == "{":
                text = token.string[tokens[at + 1].end():]
                while match := MATCHER.match(text):
                    matchers.append(match.groups())
                    text = text[match.end():]
                if not text.lstrip().startswith("}"):
                    raise ValueError(f"{self.where}: cannot parse the matchers: {self.text}")
            self.metrics.append((word, matchers))


def of_dashboard(path):
    """Returns the queries of a dashboard: panels, annotations, variables."""
    dashboard = json.loads(path.read_text())
    found = []
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            shown = set(SHOWN.findall(target.get("legendFormat", "")))
            found.append(Query(f"panel {panel['title']!r}", target["expr"], shown))
    for annotation in dashboard["annotations"]["list"]:
        shown = set(SHOWN.findall(annotation.get("titleFormat", "")))
        found.append(Query(f"annotation {annotation['name']!r}", annotation["expr"], shown))
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            values = re.fullmatch(r"label_values\((.*),\s*(\w+)\)", variable["query"])
            series, label = values.groups()
            found.append(Query(f"variable {variable['name']!r}", series, {label}))
    return found


def of_rules(path):
    """Returns the queries of a file of rules. Reads only the YAML that this file uses."""
    found, rule, lines = [], None, path.read_text().splitlines()
    for at, line in enumerate(lines):
        if match := re.match(r"\s*- alert: (\w+)", line):
            rule = match.group(1)
        elif match := re.match(r"(\s*)expr: (.*)", line):
            indent, text = match.groups()
            if text == "|":
                block = []
                for below in lines[at + 1:]:
                    if below.strip() and not below.startswith(indent + "  "):
                        break
                    block.append(below.strip())
                text = " ".join(block)
            found.append(Query(f"alert {rule}", text))
        elif rule and found:
            found[-1].shown |= set(re.findall(r"\$labels\.(\w+)", line))
    return found
