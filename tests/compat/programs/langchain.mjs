// LangChain's JavaScript edition.
import { ChatOpenAI } from "@langchain/openai";
import { tool } from "@langchain/core/tools";
import { baseURL, failure, long, model, nobody, place, question, report, short } from "./common.mjs";

const chat = (name, maxTokens) =>
  new ChatOpenAI({ model: name, maxTokens, temperature: 0, apiKey: "any", maxRetries: 0, configuration: { baseURL } });
const whole = await chat(model, short).invoke(question);
let streamed = "";
let last = null;
for await (const chunk of await chat(model, short).stream(question)) {
  streamed += chunk.content;
  last = chunk.usage_metadata ?? last;
}
const lookUp = tool(async () => "found", { name: "look_up", description: "Looks up.", schema: place });
const called = await chat(model, long).bindTools([lookUp], { tool_choice: "required" }).invoke(question);
const structured = chat(model, long).withStructuredOutput(place, { name: "place", method: "jsonSchema" });
report({
  text: whole.content,
  streamed,
  calls: called.tool_calls.map((call) => call.args),
  structured: [await structured.invoke(question)],
  usage: [whole.usage_metadata.output_tokens, last.output_tokens],
  error: await failure(() => chat(nobody, short).invoke(question)),
});
