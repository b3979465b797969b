// Checks custom resources, read as JSON from standard input, against the schemas of their definitions.
// The schemas accept names that they do not know. So each value is also replaced by one of a wrong
// type, which must be refused: otherwise its name is unknown.
import { readFileSync } from "node:fs";

const PACKAGES = {
  "keda.sh/v1alpha1": "@kubernetes-models/keda/keda.sh/v1alpha1",
  "monitoring.coreos.com/v1": "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1",
};

function problem(Model, resource) {
  try {
    new Model(structuredClone(resource)).validate();
    return "";
  } catch (error) {
    return error.message;
  }
}

function* holders(value, path) {
  if (value === null || typeof value !== "object") return;
  for (const [name, part] of Object.entries(value)) {
    yield [value, name, [...path, name].join(".")];
    yield* holders(part, [...path, name]);
  }
}

function unknown(Model, resource) {
  const found = [];
  for (const [holder, name, path] of holders(resource.spec, [])) {
    const value = holder[name];
    holder[name] = typeof value === "object" ? 7 : [[]];
    if (!problem(Model, resource)) found.push(path);
    holder[name] = value;
  }
  return found;
}

const report = [];
for (const resource of JSON.parse(readFileSync(0))) {
  const { kind, apiVersion } = resource;
  const Model = (await import(`${PACKAGES[apiVersion]}/${kind}`))[kind];
  report.push({ kind, problem: problem(Model, resource), unknown: unknown(Model, resource) });
}
console.log(JSON.stringify(report));
