// OpenAI's agents SDK in JavaScript: chat completions and responses.
import { Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, run, setTracingDisabled, tool } from "@openai/agents";
import OpenAI from "openai";
import { baseURL, failure, model, nobody, place, question, report, short } from "./common.mjs";

setTracingDisabled(true);
const client = new OpenAI({ baseURL, apiKey: "any", maxRetries: 0 });
// An end of the text after `short` tokens: for the SDK a response that was cut off is an error.
const providerData = { min_tokens: short, logit_bias: { 258: 100 } };
const agent = (Kind, name = model, more = {}) => {
  const { toolChoice, ...rest } = more;
  const modelSettings = { temperature: 0, toolChoice, providerData };
  return new Agent({ name: "one", model: new Kind(client, name), modelSettings, ...rest });
};
const got = { text: [], streamed: [], calls: [], structured: [], usage: [] };
const lookUp = tool({
  name: "look_up",
  description: "Looks up.",
  parameters: place,
  execute: async (input) => {
    got.calls.push(input);
    return "found";
  },
});
for (const Kind of [OpenAIChatCompletionsModel, OpenAIResponsesModel]) {
  const whole = await run(agent(Kind), question);
  got.text.push(whole.finalOutput);
  got.usage.push(whole.state.usage.outputTokens - 1); // the end is a token
  const stream = await run(agent(Kind), question, { stream: true });
  let streamed = "";
  for await (const text of stream.toTextStream()) streamed += text;
  await stream.completed;
  got.streamed.push(streamed);
  got.structured.push((await run(agent(Kind, model, { outputType: place }), question)).finalOutput);
  await run(agent(Kind, model, { tools: [lookUp], toolChoice: "required" }), question);
  got.error = await failure(() => run(agent(Kind, nobody), question));
}
for (const name of ["text", "streamed"]) {
  if (got[name][0] !== got[name][1]) throw new Error(`${name}: ${JSON.stringify(got[name])}`);
  got[name] = got[name][0];
}
report(got);
